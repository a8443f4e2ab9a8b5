// What the sampler writes of a row once its token is known.
#pragma once

#include "core/step_layout.h"
#include "cuda/common/reduce.cuh"
#include "params/step.h"

namespace headway::cuda {

inline constexpr int kUnusableRow = -1;  // in place of a token: NaN or +inf among the logits

// Every thread of the block calls it.
__device__ inline void clear_alternatives(const SampleParams& params, int index) {
  const int64_t first = static_cast<int64_t>(index) * params.max_logprobs;
  for (int i = static_cast<int>(threadIdx.x); i < params.max_logprobs; i += static_cast<int>(blockDim.x)) {
    params.top_ids[first + i] = -1;
    params.top_logprobs[first + i] = 0.0f;
  }
}

// All lanes of a warp call it.
__device__ inline bool is_stop_id(const SampleParams& params, int row, int token) {
  const int32_t* stop_ids = params.mirror.stop_ids + static_cast<int64_t>(row) * kMaxStopIds;
  const int count = params.mirror.sampling[row].num_stop_ids;
  bool is_found = false;
  for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < count; i += kWarpSize) {
    is_found = is_found || stop_ids[i] == token;
  }
  return __any_sync(kFullWarp, is_found) != 0;
}

// Completes `result`, whose row, logprob and rank are set, with the token or kUnusableRow. Every thread of a block
// calls it; with targets no row stops.
__device__ inline void write_result(const SampleParams& params, int index, int kv_len, int token, ResultRow result) {
  if (threadIdx.x >= kWarpSize) return;
  result.is_bad = token == kUnusableRow ? 1 : 0;
  if (token != kUnusableRow) result.token = token;
  if (token != kUnusableRow && params.targets == nullptr) {
    const RowSampling& sampling = params.mirror.sampling[result.row];
    const bool is_end = kv_len >= sampling.min_total_len && is_stop_id(params, result.row, token);
    result.is_stopped = is_end || kv_len + 1 >= sampling.max_total_len ? 1 : 0;
  }
  if (threadIdx.x == 0) params.results[index] = result;
}

}  // namespace headway::cuda
