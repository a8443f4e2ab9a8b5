// Last kernel of a step: advances the mirror by what was sampled and publishes the results to the host's ring, the step
// number last. One block: its barrier orders the entry's parts before the number.
#include "core/state_base.h"
#include "cuda/common/check.h"
#include "cuda/common/clock.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "finish_step";
constexpr int kThreads = 512;

// Row i's KV and state are written up to row_start + its tokens; the dummy row stays as it is.
__device__ void advance_rows(const FinishStepParams& params) {
  const StepInputs& inputs = params.inputs;
  for (int i = static_cast<int>(threadIdx.x); i < params.num_rows; i += kThreads) {
    const int row = inputs.rows[i];
    if (row == kDummyRow) continue;
    const int32_t num_computed = inputs.kv_lens[i];
    params.mirror.num_computed[row] = num_computed;
    const bool is_decode = i < params.num_decode_rows;
    int32_t& base = params.mirror.state_base[inputs.write_slots[i]];
    base =
        is_decode ? next_state_base(base, inputs.row_start[i], num_computed, params.mirror.state_window) : num_computed;
    if (i >= params.num_sampled) continue;
    params.mirror.last_token[row] = params.results[i].token;
    params.mirror.stopped[row] = params.results[i].is_stopped;
  }
}

// Coalesced 4-byte copies: the entry lies in host memory, where each store is a bus transaction.
__device__ void copy_words(const void* source, void* target, int num_words) {
  const auto* from = static_cast<const int32_t*>(source);
  auto* to = static_cast<int32_t*>(target);
  for (int i = static_cast<int>(threadIdx.x); i < num_words; i += kThreads) to[i] = from[i];
}

__global__ void __launch_bounds__(kThreads) finish_step_kernel(FinishStepParams params) {
  const StepCounter* counter = params.mirror.counter;
  const bool is_replayed = params.ring_num_entries > 0;
  const int64_t step = is_replayed ? counter->step : params.step;
  const int num_sampled = is_replayed ? min(counter->num_sampled, params.num_sampled) : params.num_sampled;
  const int64_t entry_offset = is_replayed ? step % params.ring_num_entries * params.ring_entry_bytes : 0;
  uint8_t* entry = params.ring_entry + entry_offset;

  advance_rows(params);

  // The entry: rows, then alternatives, each part at the place its capacity gives it.
  constexpr int kRowWords = sizeof(ResultRow) / sizeof(int32_t);
  const int64_t max_alternatives = static_cast<int64_t>(params.ring_max_results) * params.max_logprobs;
  uint8_t* rows = entry + sizeof(ResultHeader);
  uint8_t* top_ids = rows + static_cast<int64_t>(params.ring_max_results) * sizeof(ResultRow);
  uint8_t* top_logprobs = top_ids + max_alternatives * sizeof(int32_t);
  const int num_results = num_sampled + params.num_scored;
  copy_words(params.results, rows, num_results * kRowWords);
  copy_words(params.top_ids, top_ids, num_results * params.max_logprobs);
  copy_words(params.top_logprobs, top_logprobs, num_results * params.max_logprobs);
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0) return;

  // The header; its step last, released to the host.
  auto* header = reinterpret_cast<ResultHeader*>(entry);
  header->begin_ns = counter != nullptr ? counter->begin_ns : 0;
  header->end_ns = counter != nullptr ? device_clock_ns() : 0;
  header->num_sampled = num_sampled;
  header->num_scored = params.num_scored;
  __threadfence_system();
  asm volatile("st.release.sys.s64 [%0], %1;" ::"l"(&header->step), "l"(step) : "memory");
}

}  // namespace

void finish_step(const FinishStepParams& params, Stream stream) {
  require(params.ring_num_entries == 0 || params.mirror.counter != nullptr, kOp, "a ring needs mirror.counter");
  finish_step_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  check_launch(kOp);
}

}  // namespace headway::cuda
