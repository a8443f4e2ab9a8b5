// Where snapshots are taken in a prompt: at its last usable boundary, where the tree knows it to part from another,
// where a waiting request will part from it, and at a stride.
#include <algorithm>
#include <numeric>

#include "core/planner.h"
#include "core/prefix_cache.h"

namespace headway {
namespace {

constexpr int32_t kNumWaitingSeen = 16;  // requests of the queue's head whose prompts are compared

}  // namespace

void PrefixCache::note_step(StepDraft& draft, const WaitingQueue& waiting) {
  if (!is_on()) return;
  StepNotes& step_notes = notes(draft.step);
  for (size_t i = draft.num_decode_rows; i < draft.rows.size(); ++i) {
    const StepRow& row = draft.rows[i];
    if (rows_.request(row.row) != draft.requests[i]) continue;  // evicted while this step was planned
    const Chunk chunk{draft.requests[i], row.row, row.start, row.start + row.num_tokens};
    RowPrefix& prefix = prefixes_[row.row];
    step_notes.chunks.push_back(chunk);
    if (chunk.end == prefix.prompt_len) prefix.last_prompt_step = draft.step;
    if (has_states_ && prefix.publishes) plan_snapshots(chunk, static_cast<int32_t>(i), draft, waiting);
    prefix.decided_len = chunk.end;
  }
}

void PrefixCache::plan_snapshots(const Chunk& chunk, int32_t row_index, StepDraft& draft, const WaitingQueue& waiting) {
  std::vector<PlannedSnapshot>& planned = notes(draft.step).snapshots;
  const size_t num_before = planned.size();
  collect_positions(chunk, waiting);
  for (const int32_t position : positions_) {
    SlotTicket ticket;
    if (static_cast<int32_t>(planned.size()) == config_.max_packet_snapshots() || !acquire_snapshot(ticket)) break;
    planned.push_back({chunk.row, position, std::move(ticket)});
  }
  const auto first = planned.begin() + static_cast<std::ptrdiff_t>(num_before);
  std::sort(first, planned.end(), [](const auto& a, const auto& b) { return a.position < b.position; });
  for (auto i = first; i != planned.end(); ++i) {
    draft.snapshots.push_back({row_index, i->position, i->ticket.slot(), 0});
  }
}

// Those that matter most first.
void PrefixCache::collect_positions(const Chunk& chunk, const WaitingQueue& waiting) {
  positions_.clear();
  const auto want = [&](int32_t position) {
    const bool is_known = std::ranges::find(positions_, position) != positions_.end();
    const bool is_inside = position > chunk.start && position <= chunk.end;
    if (is_inside && !is_known && positions_.size() < positions_.capacity()) positions_.push_back(position);
  };
  const RowPrefix& prefix = prefixes_[chunk.row];
  const auto prompt = std::span<const int32_t>(chunk.request->tokens).first(prefix.prompt_len);
  int32_t num_seen = 0;
  for (const Request* other : waiting.requests()) {
    if (++num_seen > kNumWaitingSeen) break;
    if (other->root != chunk.request->root) continue;
    const auto usable = std::span<const int32_t>(other->tokens).first(other->num_tokens() - 1);
    want(align_down(num_common_tokens(prompt, usable)));
  }
  want(align_down(prefix.match_len));
  want(align_down(prefix.prompt_len - 1));
  if (config_.snapshot_stride_tokens == 0) return;
  const int64_t stride = std::max<int64_t>(unit_, config_.snapshot_stride_tokens / unit_ * unit_);
  for (int64_t position = chunk.start / stride * stride + stride; position <= chunk.end; position += stride) {
    want(static_cast<int32_t>(position));
  }
}

// One slot within the snapshots' share, at an older snapshot's expense where none is free.
bool PrefixCache::acquire_snapshot(SlotTicket& ticket) {
  if (tree_.num_snapshots() + num_planned_ >= config_.max_snapshots && !tree_.evict_snapshot()) return false;
  if (!slots_.has_room() && !tree_.evict_snapshot()) return false;
  ticket = slots_.acquire();
  ++num_planned_;
  return true;
}

}  // namespace headway
