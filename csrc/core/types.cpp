#include "core/types.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "core/error.h"

namespace headway {
namespace {

constexpr int64_t kRingAlignment = 64;
constexpr int64_t kSectionAlignment = 16;
constexpr int32_t kMaxCount = 1 << 29;  // keeps every sum of two counts within int32
constexpr int32_t kMaxRows = 1 << 20;
constexpr int32_t kMaxLaunchDepth = 64;
constexpr int32_t kMinPacketSharedBlocks = 4096;
constexpr int32_t kFullListsPerPacket = 64;  // rows admitted in one step with the longest stop and bias lists
constexpr int32_t kWordsPerRow = kMaxStopIds + 2 * kMaxLogitBias + kMaxBadWordEntries;
constexpr int32_t kMasksPerPacket = 256;  // rows beyond wait for the next step

int64_t align_up(int64_t num_bytes, int64_t alignment) {
  return (num_bytes + alignment - 1) / alignment * alignment;
}

void require_range(const char* name, int32_t value, int32_t low, int32_t high) {
  if (value < low || value > high) {
    throw RequestError(name, value, "in [" + std::to_string(low) + ", " + std::to_string(high) + "]");
  }
}

}  // namespace

void LedgerConfig::validate() const {
  require_range("max_rows", max_rows, 1, kMaxRows);
  require_range("num_blocks", num_blocks, 0, kMaxCount);
  require_range("block_size", block_size, 1, kMaxCount);
  require_range("num_slots", num_slots, 0, kMaxCount);
  require_range("max_model_len", max_model_len, 2, kMaxCount);
  require_range("max_step_tokens", max_step_tokens, 1, kMaxCount);
  require_range("vocab_size", vocab_size, 1, kMaxCount);
  require_range("max_logprobs", max_logprobs, 0, vocab_size);
  require_range("max_launch_depth", max_launch_depth, 0, kMaxLaunchDepth);
  require_range("grant_ahead_blocks", grant_ahead_blocks, 0, kMaxRows);
  require_range("prompt_grid_tokens", prompt_grid_tokens, 1, max_step_tokens);
  require_range("min_last_chunk_tokens", min_last_chunk_tokens, 1, prompt_grid_tokens);
  const int32_t most_uncut = prompt_grid_tokens + min_last_chunk_tokens - 1;  // in one step, or a prompt never moves
  require_range("max_step_tokens", max_step_tokens, most_uncut, kMaxCount);
  require_range("max_scored_tokens", max_scored_tokens, 0, kMaxRows);
  if (max_scored_tokens > 0) require_range("max_scored_tokens", max_scored_tokens, most_uncut, kMaxRows);
  require_range("max_snapshots", max_snapshots, 0, num_slots);
  require_range("max_waypoints", max_waypoints, 0, max_snapshots);
  require_range("snapshot_stride_tokens", snapshot_stride_tokens, 0, kMaxCount);
  require_range("decode_snapshot_stride_tokens", decode_snapshot_stride_tokens, 0, kMaxCount);
  require_range("num_host_blocks", num_host_blocks, 0, num_blocks > 0 ? kMaxCount : 0);
  require_range("num_host_slots", num_host_slots, 0, num_slots > 0 ? kMaxCount : 0);
  require_range("state_window", state_window.num_tokens, 0, kMaxCount);
  require_range("max_rewind", state_window.max_rewind, state_window.num_tokens > 0 ? 1 : 0, kMaxCount);
}

bool LedgerConfig::has_host_tier() const {
  const bool has_blocks = num_blocks == 0 || num_host_blocks > 0;
  const bool has_slots = num_slots == 0 || num_host_slots > 0;
  return use_prefix_cache && has_blocks && has_slots && num_host_blocks + num_host_slots > 0;
}

int32_t LedgerConfig::max_blocks_per_row() const {
  return std::max(1, blocks_for(max_model_len));
}

int32_t LedgerConfig::max_packet_words() const {
  return std::min(max_rows, kFullListsPerPacket) * kWordsPerRow;
}

// A row with n tokens gains at most n / S + 1 blocks, and those ahead.
int32_t LedgerConfig::max_packet_grants() const {
  const int64_t most = max_step_tokens / block_size + int64_t{max_rows} * (1 + grant_ahead_blocks);
  return static_cast<int32_t>(std::min<int64_t>(most, num_blocks)) + max_packet_shared_blocks();
}

// One request's at least.
int32_t LedgerConfig::max_packet_shared_blocks() const {
  return use_prefix_cache && num_blocks > 0 ? std::max(max_blocks_per_row(), kMinPacketSharedBlocks) : 0;
}

int64_t LedgerConfig::prefix_unit_tokens() const {
  return num_slots > 0 ? std::lcm<int64_t>(block_size, prompt_grid_tokens) : block_size;
}

int32_t LedgerConfig::max_packet_masks() const {
  return std::min(max_rows, kMasksPerPacket);
}

// At each cut of the grid and at each chunk's end.
int32_t LedgerConfig::max_packet_snapshots() const {
  return std::min(num_slots, max_step_tokens / prompt_grid_tokens + max_rows);
}

// Of each running row one, and of each that has ended since the step before.
int32_t LedgerConfig::max_packet_copies() const {
  return std::min(num_slots, 2 * max_rows);
}

int64_t LedgerConfig::packet_entry_bytes() const {
  const int64_t sections[] = {
      static_cast<int64_t>(sizeof(RowInit)) * max_rows,
      static_cast<int64_t>(sizeof(int32_t)) * max_packet_words(),
      static_cast<int64_t>(sizeof(BlockGrant)) * max_packet_grants(),
      static_cast<int64_t>(sizeof(StepRow)) * max_rows,
      static_cast<int64_t>(sizeof(int32_t)) * max_packet_tokens(),
      static_cast<int64_t>(sizeof(StateSnapshot)) * max_packet_snapshots(),
      static_cast<int64_t>(sizeof(StateCopy)) * max_packet_copies(),
      static_cast<int64_t>(sizeof(RowRewind)) * max_rows,
      static_cast<int64_t>(sizeof(int32_t)) * max_packet_masks(),
      static_cast<int64_t>(sizeof(uint32_t)) * max_packet_masks() * mask_words(),
      static_cast<int64_t>(sizeof(ScoredToken)) * max_scored_tokens,
  };
  int64_t total = sizeof(PacketHeader);
  for (const int64_t num_bytes : sections) total += align_up(num_bytes, kSectionAlignment);
  return align_up(total, kRingAlignment);
}

int64_t LedgerConfig::result_entry_bytes() const {
  const int64_t row_bytes = sizeof(ResultRow) + (sizeof(int32_t) + sizeof(float)) * int64_t{max_logprobs};
  return align_up(sizeof(ResultHeader) + row_bytes * max_results(), kRingAlignment);
}

void CommitRecord::clear() {
  request_ids.clear();
  tokens.clear();
  finish_reasons.clear();
  stop_tokens.clear();
  cached_tokens.clear();
  logprobs.clear();
  ranks.clear();
  top_ids.clear();
  top_logprobs.clear();
  score_request_ids.clear();
  score_tokens.clear();
  score_logprobs.clear();
  score_ranks.clear();
  score_top_ids.clear();
  score_top_logprobs.clear();
}

void CommitRecord::reserve_scores(size_t num_scored) {
  score_request_ids.reserve(num_scored);
  score_tokens.reserve(num_scored);
  score_logprobs.reserve(num_scored);
  score_ranks.reserve(num_scored);
  score_top_ids.reserve(num_scored * num_columns);
  score_top_logprobs.reserve(num_scored * num_columns);
}

void CommitRecord::reserve(size_t num_results, bool has_alternatives) {
  request_ids.reserve(num_results);
  tokens.reserve(num_results);
  finish_reasons.reserve(num_results);
  stop_tokens.reserve(num_results);
  cached_tokens.reserve(num_results);
  logprobs.reserve(num_results);
  ranks.reserve(num_results);
  if (!has_alternatives) return;
  top_ids.reserve(num_results * num_columns);
  top_logprobs.reserve(num_results * num_columns);
}

}  // namespace headway
