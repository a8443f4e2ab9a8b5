// The router of a small batch in one launch: a block computes one expert's logits for all tokens, and the block that is
// done last chooses, a warp a token. A logit is summed in an order fixed by the hidden size, so it does not depend on
// the batch.
#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"
#include "cuda/route_choice.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "route_hidden";
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTokens = 8;  // of a pass over the expert's weights
constexpr int kColumns = 4;  // of a thread's step: 16 bytes of fp32 weights
constexpr int kUnroll = 6;  // steps whose weights are in flight together

// Adds to sums[t], t < num_tokens, the thread's part of <weight, token t>; tokens are x_stride elements apart. The
// weights are on their way before the previous kernel is over.
template <typename T>
__device__ void accumulate(const float* weight, const T* x, int64_t x_stride, int hidden, int num_tokens,
                           float (&sums)[kTokens]) {
  constexpr int kStep = kColumns * kThreads;
  for (int begin = static_cast<int>(threadIdx.x) * kColumns; begin < hidden; begin += kUnroll * kStep) {
    float weights[kUnroll][kColumns] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (begin + u * kStep < hidden) load_floats(weight + begin + u * kStep, weights[u]);
    }
    wait_for_previous_kernel();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool is_inside = begin + u * kStep < hidden;
      float inputs[kTokens][kColumns] = {};
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (is_inside && t < num_tokens) load_floats(x + t * x_stride + begin + u * kStep, inputs[t]);
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) sums[t] = fmaf(weights[u][i], inputs[t][i], sums[t]);
      }
    }
  }
  wait_for_previous_kernel();  // threads without columns
}

// Whether this block is the last of the grid to get here; what the others wrote before is then visible to it.
__device__ bool is_last_block(int32_t* num_done) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(num_done, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  __threadfence();
  return is_last;
}

template <typename T, int kItems>
__global__ void __launch_bounds__(kThreads) route_hidden_kernel(const __grid_constant__ RouteHiddenParams params) {
  __shared__ float parts[kTokens][kWarps];
  allow_next_kernel();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_tokens = static_cast<int>(params.choice.num_tokens);
  const int num_experts = params.choice.num_experts;
  const auto expert = static_cast<int64_t>(blockIdx.x);

  // Act 1: the expert's logits.
  for (int first = 0; first < num_tokens; first += kTokens) {
    const int count = min(kTokens, num_tokens - first);
    float sums[kTokens] = {};
    accumulate(params.weight + expert * params.hidden, static_cast<const T*>(params.x) + first * params.x_stride,
               params.x_stride, params.hidden, count, sums);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float part = warp_sum(sums[t]);
      if (lane == 0) parts[t][warp] = part;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) {
      const float* part = parts[threadIdx.x];
      params.logits[(first + threadIdx.x) * num_experts + expert] = (part[0] + part[1]) + (part[2] + part[3]);
    }
    __syncthreads();
  }

  // Act 2: the last block has all logits.
  if (!is_last_block(params.num_done)) return;
  if (threadIdx.x == 0) *params.num_done = 0;  // for the next launch
  for (int token = warp; token < num_tokens; token += kWarps) {
    choose_experts<kItems>(params.choice, params.logits + token * num_experts, token, lane);
  }
}

}  // namespace

void route_hidden(const RouteHiddenParams& params, Stream stream) {
  if (params.choice.num_tokens == 0 || params.choice.top_k == 0) return;
  const bool is_aligned = params.hidden % kColumns == 0 && params.x_stride % kColumns == 0 &&
                          reinterpret_cast<uintptr_t>(params.x) % kVectorBytes == 0 &&
                          reinterpret_cast<uintptr_t>(params.weight) % kVectorBytes == 0;
  require(is_aligned, kOp, "hidden and x's stride must be multiples of 4, pointers 16-byte aligned");
  dispatch_dtype(params.dtype, kOp, [&](auto dtype) {
    dispatch_experts(params.choice, kOp, [&](auto items) {
      launch_chained(kOp, route_hidden_kernel<typename decltype(dtype)::Type, decltype(items)::kItems>,
                     dim3(static_cast<unsigned>(params.choice.num_experts)), kThreads,
                     static_cast<cudaStream_t>(stream), params);
    });
  });
}

}  // namespace headway::cuda
