// What goes in and out of the ledger: sizes, sampling, the plan of a step, the changes of a commit, counters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/step_layout.h"

namespace headway {

// Sizes of everything the ledger accounts for. Counts exclude the dummies at index 0.
struct LedgerConfig {
  int32_t max_rows = 0;         // requests that hold a row at once
  int32_t num_blocks = 0;       // KV blocks; 0 for a model without attention
  int32_t block_size = 0;       // S: tokens a block
  int32_t num_slots = 0;        // Mamba state slots; 0 for a model without Mamba layers
  int32_t max_model_len = 0;    // tokens of one sequence
  int32_t max_step_tokens = 0;  // T of the largest step
  int32_t vocab_size = 0;
  int32_t max_logprobs = 0;        // K: columns of the top alternatives
  int32_t max_launch_depth = 0;    // steps in flight beyond the one the host waits for
  int32_t grant_ahead_blocks = 1;  // blocks granted before the boundary
  int32_t prompt_grid_tokens = 1;  // prompts are cut into steps at absolute multiples of it
  int32_t min_last_chunk_tokens = 1;  // of a prompt that is cut
  int32_t max_scored_tokens = 0;   // prompt tokens of a step whose logprobs are reported; 0: no request may ask
  bool use_prefix_cache = false;
  int32_t max_snapshots = 0;           // of the slots, those that cached states may hold
  int32_t max_waypoints = 0;           // of those, states on the way of prompts and outputs: they push out no others
  int32_t snapshot_stride_tokens = 0;  // between a prompt's waypoints, which lie closer near its ends; 0: none
  int32_t decode_snapshot_stride_tokens = 0;  // between an output's; 0: none
  bool weighs_snapshot_cost = false;   // evict, of the oldest snapshots, the one that spares the fewest tokens
  // What a request leaves at its end includes what it generated. Without, a cached prompt has the bits of a computed
  // one: it holds nothing that decode kernels have written, and its rest is no shorter than a chunk behind a cut.
  bool caches_outputs = true;
  // KV blocks and states in host memory, for what the cache would evict; no such tier where the model has a kind of
  // which there are none.
  int32_t num_host_blocks = 0;
  int32_t num_host_slots = 0;
  StateWindow state_window = {};   // how far states lag behind their rows

  void validate() const;  // throws RequestError

  bool has_host_tier() const;
  int32_t max_in_flight() const { return max_launch_depth + 1; }
  int32_t blocks_for(int64_t num_tokens) const {
    return num_blocks == 0 ? 0 : static_cast<int32_t>((num_tokens + block_size - 1) / block_size);
  }
  int32_t max_blocks_per_row() const;  // at least 1, so that the block table is never empty
  int32_t max_packet_words() const;    // stop ids and logit biases that one packet can bring
  int32_t max_packet_grants() const;
  int32_t max_packet_masks() const;
  int32_t mask_words() const { return (vocab_size + 31) / 32; }  // of 32 bits, of a token mask
  int32_t max_results() const { return max_rows + max_scored_tokens; }  // that a step reports
  int32_t max_packet_shared_blocks() const;  // of those, blocks that admitted rows share with the prefix cache
  // Prompts are matched with the cache, and their states kept, at multiples of it: no shorter prefix can be cached.
  int64_t prefix_unit_tokens() const;
  int32_t max_packet_snapshots() const;
  int32_t max_packet_copies() const;
  int32_t max_packet_tokens() const { return max_step_tokens + max_model_len; }  // chunks, and history before them
  int64_t packet_entry_bytes() const;
  int64_t packet_ring_bytes() const { return packet_entry_bytes() * max_in_flight(); }
  int64_t result_entry_bytes() const;  // laid out for max_results results
  int64_t result_ring_bytes() const { return result_entry_bytes() * max_in_flight(); }
};

enum class FinishReason : int32_t { kNotFinished = 0, kStop = 1, kLength = 2, kAbort = 3, kError = 4 };

// What RowSampling holds, minus what follows from lengths, plus the lists that go with it.
struct SamplingSpec {
  uint64_t seed = 0;
  float temperature = 0.0f;
  float top_p = 1.0f;
  float min_p = 0.0f;
  int32_t top_k = 0;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  int32_t min_tokens = 0;
  int32_t num_logprobs = -1;
  int32_t num_prompt_logprobs = -1;
  bool has_processed_logprobs = false;  // of what is sampled from, not of the model's logits
  // Nothing is sampled before set_token_mask() has said what may be, at every position anew.
  bool is_guided = false;
  std::vector<int32_t> stop_ids = {};
  std::vector<std::pair<int32_t, float>> logit_bias = {};
  std::vector<std::vector<int32_t>> bad_words = {};  // token sequences that are never completed
  std::vector<uint32_t> token_mask = {};  // [mask_words] what may be sampled, for good; empty: anything
};

// One step to launch.
struct Plan {
  int64_t step = 0;
  int32_t num_rows = 0;  // R
  int32_t num_decode_rows = 0;
  int32_t num_sampled = 0;          // Rs
  int32_t num_tokens = 0;           // T
  int32_t max_query_len = 0;        // tokens of the longest row of this step
  int32_t max_kv_len = 0;           // upper bound of the rows' KV length after this step
  int32_t num_snapshots = 0;        // states that the step's prompt chunks leave beside the rows' own
  int32_t num_copies = 0;           // states to copy before the layers run
  int32_t num_scored = 0;           // prompt tokens whose logprobs are reported
  int32_t num_admitted = 0;         // requests that got a row in this step, for the first time or again
  const uint8_t* packet = nullptr;  // null: nothing new; otherwise valid until the step is committed
  uint32_t packet_bytes = 0;
  uint32_t copies_offset = 0;  // of the StateCopy section in the packet
  uint8_t* result = nullptr;  // the ring entry the step publishes to
};

// What one retired step changed. Lists share an index; void results are left out.
struct CommitRecord {
  int64_t step = 0;
  int32_t num_columns = 0;  // max_logprobs
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  std::vector<int64_t> request_ids;
  std::vector<int32_t> tokens;          // -1 where the reason is kError
  std::vector<int32_t> finish_reasons;  // FinishReason
  std::vector<int32_t> stop_tokens;     // the stop id that ended the request, -1 if none
  std::vector<int32_t> cached_tokens;  // of the request's prompt, those that were not computed at its first admission
  std::vector<float> logprobs;
  std::vector<int32_t> ranks;
  std::vector<int32_t> top_ids;  // [n, max_logprobs], -1 where unused; empty when no row asked for any
  std::vector<float> top_logprobs;  // likewise

  // Prompt tokens that were scored; lists share another index.
  std::vector<int64_t> score_request_ids;
  std::vector<int32_t> score_tokens;
  std::vector<float> score_logprobs;
  std::vector<int32_t> score_ranks;
  std::vector<int32_t> score_top_ids;  // [m, max_logprobs], -1 where unused
  std::vector<float> score_top_logprobs;  // likewise

  void clear();
  void reserve(size_t num_results, bool has_alternatives);
  void reserve_scores(size_t num_scored);
};

// How much of a sequence the prefix cache holds. Nodes of its tree are ids > 0, roots < 0.
struct PrefixMatch {
  int32_t node = 0;  // deepest full node that agrees, or the root
  int32_t num_tokens = 0;  // to that node's end: KV is there for so many
  int32_t start_node = 0;  // where computing can begin: at this node's end; 0: at the sequence's beginning
  int32_t start = 0;  // tokens before that point
  int32_t held_start = 0;  // a later such point that is had when steps in flight have retired; 0: there is none
};

// What the prefix cache holds and did. Requests are counted at their first admission, unless they opted out.
struct PrefixStats {
  int64_t num_lookups = 0;
  int64_t num_hits = 0;  // that start behind their first token
  int64_t num_prompt_tokens = 0;
  int64_t num_cached_tokens = 0;  // of those, not computed
  int64_t num_waits = 0;  // requests that let others pass until a running prompt had left their prefix
  // Every miss has one reason; the first that holds.
  int64_t num_too_short = 0;  // the prompt is shorter than what can be cached
  int64_t num_pending = 0;  // a running prompt was about to leave some of it, too little to wait for
  int64_t num_without_snapshot = 0;  // KV is there, but no state
  int64_t num_other_salt = 0;  // it is there under another salt
  int64_t num_without_kv = 0;
  int64_t num_blocks = 0;  // that the cache holds, some with rows
  int64_t num_evictable_blocks = 0;  // with nobody: as good as free
  int64_t num_snapshots = 0;
  int64_t num_waypoints = 0;  // of those, kept on the way
  int64_t num_snapshots_taken = 0;
  int64_t num_evicted_blocks = 0;
  int64_t num_evicted_snapshots = 0;  // those moved to host memory are not
  // Of the host tier; zeros where there is none.
  int64_t num_host_blocks = 0;
  int64_t num_host_snapshots = 0;
  int64_t num_saved_blocks = 0;  // moved to host memory
  int64_t num_saved_snapshots = 0;
  int64_t num_loaded_blocks = 0;  // and brought back
  int64_t num_loaded_snapshots = 0;
  int64_t num_host_hits = 0;  // of the hits, those that start where only host memory had what they need
};

struct Stats {
  int64_t num_waiting = 0;
  int64_t num_running = 0;
  int64_t num_paused = 0;
  int64_t num_held = 0;  // requests that run or wait, and lack a token mask for their next position
  int64_t blocks_total = 0;
  int64_t blocks_free = 0;
  int64_t blocks_fenced = 0;
  int64_t slots_total = 0;
  int64_t slots_free = 0;
  int64_t slots_fenced = 0;
  int64_t steps_launched = 0;
  int64_t steps_committed = 0;
  int64_t num_evictions = 0;
  int64_t num_finished = 0;
  int64_t num_transfers = 0;  // between device and host memory, not finished
};

// The newest step launched and the newest retired; steps count from 1 and retire in order.
struct StepClock {
  int64_t launched = 0;
  int64_t retired = 0;

  int64_t num_in_flight() const { return launched - retired; }
  bool has_retired(int64_t step) const { return step <= retired; }
};

}  // namespace headway
