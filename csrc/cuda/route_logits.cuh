// Router logits of a few tokens and experts, by a block: each thread has its columns, in an order fixed by the hidden
// size and the block's size, so that a logit does not depend on the batch.
#pragma once

#include "cuda/common/chained.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"

namespace headway::cuda {

inline constexpr int kRouterTokens = 8;  // of a pass over the experts' weights
inline constexpr int kRouterColumns = 4;  // of a thread's step: 16 bytes of fp32 weights

// Adds to sums[e][t], e < num_experts and t < num_tokens, the thread's part of <weights of expert e, token t>; rows of
// weights lie hidden elements apart, tokens x_stride. kUnroll steps' weights are on their way before the previous
// kernel is over.
template <int kThreads, int kUnroll, int kExperts, typename T>
__device__ void add_router_logits(const float* weight, int num_experts, const T* x, int64_t x_stride, int hidden,
                                  int num_tokens, float (&sums)[kExperts][kRouterTokens]) {
  constexpr int kStep = kRouterColumns * kThreads;
  for (int begin = static_cast<int>(threadIdx.x) * kRouterColumns; begin < hidden; begin += kUnroll * kStep) {
    float weights[kUnroll][kExperts][kRouterColumns] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int column = begin + u * kStep;
#pragma unroll
      for (int e = 0; e < kExperts; ++e) {
        if (column < hidden && e < num_experts) {
          load_floats(weight + static_cast<int64_t>(e) * hidden + column, weights[u][e]);
        }
      }
    }
    wait_for_previous_kernel();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int column = begin + u * kStep;
      float inputs[kRouterTokens][kRouterColumns] = {};
#pragma unroll
      for (int t = 0; t < kRouterTokens; ++t) {
        if (column < hidden && t < num_tokens) load_floats(x + t * x_stride + column, inputs[t]);
      }
#pragma unroll
      for (int e = 0; e < kExperts; ++e) {
#pragma unroll
        for (int t = 0; t < kRouterTokens; ++t) {
#pragma unroll
          for (int i = 0; i < kRouterColumns; ++i) sums[e][t] = fmaf(weights[u][e][i], inputs[t][i], sums[e][t]);
        }
      }
    }
  }
  wait_for_previous_kernel();  // threads without columns
}

// The block's sums meet, in the warps' order: parts[e][t][warp], t < num_tokens, is there for all threads after a
// barrier.
template <int kExperts, int kWarps>
__device__ __forceinline__ void meet_router_logits(const float (&sums)[kExperts][kRouterTokens], int num_tokens,
                                                   float (&parts)[kExperts][kRouterTokens][kWarps]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
  for (int e = 0; e < kExperts; ++e) {
#pragma unroll
    for (int t = 0; t < kRouterTokens; ++t) {
      if (t >= num_tokens) break;
      const float part = warp_sum(sums[e][t]);
      if (threadIdx.x % kWarpSize == 0) parts[e][t][warp] = part;
    }
  }
  __syncthreads();
}

template <int kWarps>
__device__ __forceinline__ float router_logit(const float (&parts)[kWarps]) {
  float logit = parts[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) logit += parts[warp];
  return logit;
}

}  // namespace headway::cuda
