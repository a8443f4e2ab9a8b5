// Last op of a step: advances the mirror by what was sampled and publishes the results to the host's ring, the step
// number last, with release order.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/state_base.h"
#include "cpu/ops.h"

namespace headway::cpu {
namespace {

void advance_rows(const FinishStepParams& params) {
  for (int i = 0; i < params.num_rows; ++i) {
    const int row = params.inputs.rows[i];
    if (row == kDummyRow) continue;
    const int32_t num_computed = params.inputs.kv_lens[i];
    params.mirror.num_computed[row] = num_computed;
    const bool is_decode = i < params.num_decode_rows;
    int32_t& base = params.mirror.state_base[params.inputs.write_slots[i]];
    base = is_decode ? next_state_base(base, params.inputs.row_start[i], num_computed, params.mirror.state_window)
                     : num_computed;
    if (i >= params.num_sampled) continue;
    params.mirror.last_token[row] = params.results[i].token;
    params.mirror.stopped[row] = params.results[i].is_stopped;
  }
}

}  // namespace

void finish_step(const FinishStepParams& params, Stream) {
  const StepCounter* counter = params.mirror.counter;
  const bool is_replayed = params.ring_num_entries > 0;
  const int64_t step = is_replayed ? counter->step : params.step;
  const int num_sampled = is_replayed ? std::min(counter->num_sampled, params.num_sampled) : params.num_sampled;
  uint8_t* entry = params.ring_entry + (is_replayed ? step % params.ring_num_entries * params.ring_entry_bytes : 0);

  advance_rows(params);

  // Rows, then alternatives, each part at the place its capacity gives it.
  const int num_results = num_sampled + params.num_scored;
  const size_t capacity = static_cast<size_t>(params.ring_max_results) * static_cast<size_t>(params.max_logprobs);
  const size_t used = static_cast<size_t>(num_results) * static_cast<size_t>(params.max_logprobs);
  uint8_t* rows = entry + sizeof(ResultHeader);
  uint8_t* top_ids = rows + static_cast<size_t>(params.ring_max_results) * sizeof(ResultRow);
  uint8_t* top_logprobs = top_ids + capacity * sizeof(int32_t);
  std::memcpy(rows, params.results, static_cast<size_t>(num_results) * sizeof(ResultRow));
  if (used > 0) {
    std::memcpy(top_ids, params.top_ids, used * sizeof(int32_t));
    std::memcpy(top_logprobs, params.top_logprobs, used * sizeof(float));
  }

  auto* header = reinterpret_cast<ResultHeader*>(entry);
  header->begin_ns = 0;
  header->end_ns = 0;
  header->num_sampled = num_sampled;
  header->num_scored = params.num_scored;
  std::atomic_ref<int64_t>(header->step).store(step, std::memory_order_release);
}

}  // namespace headway::cpu
