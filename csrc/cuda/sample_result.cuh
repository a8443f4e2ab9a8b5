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

// What ends a row, as the lanes of a warp hold it: it can be loaded before the token is known. With targets, nothing.
struct RowEnd {
  static constexpr int kIdsOfLane = kMaxStopIds / kWarpSize;
  int32_t stop_ids[kIdsOfLane];  // -1: none
  bool is_full;  // whatever the token is

  __device__ RowEnd(const SampleParams& params, int row, int kv_len) {
    const RowSampling& sampling = params.mirror.sampling[row];
    const int32_t* ids = params.mirror.stop_ids + static_cast<int64_t>(row) * kMaxStopIds;
    const bool is_sampled = params.targets == nullptr;
    const int count = is_sampled && kv_len >= sampling.min_total_len ? sampling.num_stop_ids : 0;
#pragma unroll
    for (int i = 0; i < kIdsOfLane; ++i) {
      const int place = i * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
      stop_ids[i] = place < count ? ids[place] : -1;
    }
    is_full = is_sampled && kv_len + 1 >= sampling.max_total_len;
  }

  __device__ bool is_reached_by(int token) const {
    bool is_end = is_full;
#pragma unroll
    for (const int32_t id : stop_ids) is_end = is_end || id == token;
    return __any_sync(kFullWarp, is_end) != 0;
  }
};

// Completes `result`, whose row, logprob and rank are set, with the token or kUnusableRow. One warp calls it.
__device__ inline void write_result(const SampleParams& params, int index, const RowEnd& end, int token,
                                    ResultRow result) {
  result.is_bad = token == kUnusableRow ? 1 : 0;
  if (token != kUnusableRow) {
    result.token = token;
    result.is_stopped = end.is_reached_by(token) ? 1 : 0;
  }
  if (threadIdx.x % kWarpSize == 0) params.results[index] = result;
}

// The same, of a row whose end was not loaded. Every thread of a block calls it.
__device__ inline void write_result(const SampleParams& params, int index, int kv_len, int token, ResultRow result) {
  if (threadIdx.x >= kWarpSize) return;
  write_result(params, index, RowEnd(params, result.row, kv_len), token, result);
}

}  // namespace headway::cuda
