// What every chunked scan shares: the tokens of a chunk, its decays, and how a lane finds its cell of an operand.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/math.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/ssm_scan.h"
#include "params/mamba.h"

namespace headway::cuda::chunk {

inline constexpr int kTokens = kChunkTokens;
inline constexpr float kLog2E = 1.44269504f;
using Bf16 = __nv_bfloat16;

__device__ __forceinline__ float low_bf16(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_bf16(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// A run of tokens of the row within one cell of the chunk grid.
struct Chunk {
  int token;  // first, flat
  int count;
};

// Decays of one chunk. Tokens behind the row's end have dt = 0: they neither decay nor add. Token j weighs
// e^(cs_i - cs_j) dt_j = 2^(log2_sum[i] + log2_weight[j]) for a later token i.
struct Decays {
  float log2_sum[kTokens];    // cs
  float log2_weight[kTokens];  // log2(dt_j) - cs_j
  float from_start[kTokens];  // e^cs_i
  float to_end[kTokens];      // e^(cs_L - cs_j) dt_j
};

// Turns the raw dt of one head into decays: one warp, lane l holds tokens 2 l and 2 l + 1.
struct HeadClock {
  const SsmScanParams& params;
  int head;
  float dt_bias;
  float log2_rate;

  __device__ __forceinline__ HeadClock(const SsmScanParams& scan, int clock_head)
      : params(scan), head(clock_head), dt_bias(scan.dt_bias[head]), log2_rate(scan.A[head] * kLog2E) {}

  // Kept as they lie in memory: a conversion would wait for them here.
  struct RawPair {
    Bf16 first;
    Bf16 second;
  };

  __device__ __forceinline__ RawPair load_dt(Chunk chunk) const {
    const int token = 2 * (static_cast<int>(threadIdx.x) % kWarpSize);
    const int64_t stride = params.dt_stride;
    const Bf16* dt = static_cast<const Bf16*>(params.dt) + (chunk.token + token) * stride + head;
    RawPair raw = {};
    if (token < chunk.count) raw.first = dt[0];
    if (token + 1 < chunk.count) raw.second = dt[stride];
    return raw;
  }

  __device__ __forceinline__ float step_size(float raw, bool is_inside) const {
    const float soft = softplus(raw + dt_bias);
    return is_inside ? fminf(fmaxf(soft, params.dt_min), params.dt_max) : 0.0f;
  }

  __device__ __forceinline__ void store_decays(Decays& decays, RawPair raw, Chunk chunk) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const float dt0 = step_size(to_float(raw.first), 2 * lane < chunk.count);
    const float dt1 = step_size(to_float(raw.second), 2 * lane + 1 < chunk.count);
    const float log0 = log2_rate * dt0;
    const float log1 = log2_rate * dt1;
    float sum = log0 + log1;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const float before = __shfl_up_sync(kFullWarp, sum, offset);
      if (lane >= offset) sum += before;
    }
    const float before = __shfl_up_sync(kFullWarp, sum, 1);
    const float sum0 = (lane == 0 ? 0.0f : before) + log0;
    const float sum1 = sum0 + log1;
    const float last = __shfl_sync(kFullWarp, sum1, kWarpSize - 1);
    *reinterpret_cast<float2*>(&decays.log2_sum[2 * lane]) = {sum0, sum1};
    *reinterpret_cast<float2*>(&decays.log2_weight[2 * lane]) = {fast_log2(dt0) - sum0, fast_log2(dt1) - sum1};
    *reinterpret_cast<float2*>(&decays.from_start[2 * lane]) = {fast_exp2(sum0), fast_exp2(sum1)};
    *reinterpret_cast<float2*>(&decays.to_end[2 * lane]) = {fast_exp2(fminf(last - sum0, 0.0f)) * dt0,
                                                            fast_exp2(fminf(last - sum1, 0.0f)) * dt1};
  }
};

// Lane's row and column in the four matrices of a matrix load.
struct LaneCell {
  int row;
  int column;
};
// Order (rows 0-7, 8-15) within (columns 0-7, 8-15): operand A as stored, operand B transposed.
__device__ __forceinline__ LaneCell rows_first() {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  return {lane % 16, lane / 16 * 8};
}
// Order (columns 0-7, 8-15) within (rows 0-7, 8-15): operand B as stored, operand A transposed.
__device__ __forceinline__ LaneCell columns_first(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
}
__device__ __forceinline__ LaneCell columns_first() {
  return columns_first(static_cast<int>(threadIdx.x) % kWarpSize);
}

}  // namespace headway::cuda::chunk
