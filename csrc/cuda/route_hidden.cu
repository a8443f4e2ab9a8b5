// The router in one launch: a block computes a few experts' logits for a group of tokens, and the group's block that is
// done last chooses, a warp a token. A logit is summed in an order fixed by the hidden size, so it does not depend on
// the batch.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"
#include "cuda/route_choice.cuh"
#include "cuda/route_logits.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "route_hidden";
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTokens = kRouterTokens;
constexpr int kManyExperts = 4;  // of a block, where there are several groups of tokens: fewer reads of the tokens

// Whether this block is the last of gridDim.x to get here; what the others wrote before is then visible to it.
__device__ bool is_last_block(int32_t* num_done) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(num_done, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  __threadfence();
  return is_last;
}

template <typename T, int kItems, int kExperts, int kUnroll>
__global__ void __launch_bounds__(kThreads) route_hidden_kernel(const __grid_constant__ RouteHiddenParams params) {
  __shared__ float parts[kExperts][kTokens][kWarps];
  allow_next_kernel();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_tokens = static_cast<int>(params.choice.num_tokens);
  const int num_experts = params.choice.num_experts;
  const int first_expert = static_cast<int>(blockIdx.x) * kExperts;
  const int first_token = static_cast<int>(blockIdx.y) * kTokens;
  const int token_step = static_cast<int>(gridDim.y) * kTokens;

  // Act 1: the experts' logits.
  for (int first = first_token; first < num_tokens; first += token_step) {
    const int count = min(kTokens, num_tokens - first);
    float sums[kExperts][kTokens] = {};
    add_router_logits<kThreads, kUnroll>(
        params.weight + static_cast<int64_t>(first_expert) * params.hidden, num_experts - first_expert,
        static_cast<const T*>(params.x) + first * params.x_stride, params.x_stride, params.hidden, count, sums);
    meet_router_logits(sums, count, parts);
    for (int i = static_cast<int>(threadIdx.x); i < kExperts * count; i += kThreads) {
      const int expert = first_expert + i % kExperts;
      const int64_t token = first + i / kExperts;
      if (expert < num_experts) {
        params.logits[token * num_experts + expert] = router_logit(parts[i % kExperts][i / kExperts]);
      }
    }
    __syncthreads();
  }

  // Act 2: the last block has all logits of these tokens.
  int32_t* num_done = params.num_done + blockIdx.y;
  if (!is_last_block(num_done)) return;
  if (threadIdx.x == 0) *num_done = 0;  // for the next launch
  for (int first = first_token; first < num_tokens; first += token_step) {
    const int token = first + warp;
    if (token < num_tokens)
      choose_experts<kItems>(params.choice, params.logits + static_cast<int64_t>(token) * num_experts, token, lane);
  }
}

template <typename T, int kItems>
void launch(const RouteHiddenParams& params, cudaStream_t stream) {
  const auto num_groups =
      static_cast<unsigned>(std::min<int64_t>(kRouteGroups, (params.choice.num_tokens + kTokens - 1) / kTokens));
  const auto num_experts = static_cast<unsigned>(params.choice.num_experts);
  if (num_groups == 1) {
    launch_chained(kOp, route_hidden_kernel<T, kItems, 1, 3>, dim3(num_experts), kThreads, stream, params);
  } else {
    launch_chained(kOp, route_hidden_kernel<T, kItems, kManyExperts, 1>,
                   dim3((num_experts + kManyExperts - 1) / kManyExperts, num_groups), kThreads, stream, params);
  }
}

}  // namespace

void route_hidden(const RouteHiddenParams& params, Stream stream) {
  if (params.choice.num_tokens == 0 || params.choice.top_k == 0) return;
  const bool is_aligned = params.hidden % kRouterColumns == 0 && params.x_stride % kRouterColumns == 0 &&
                          reinterpret_cast<uintptr_t>(params.x) % kVectorBytes == 0 &&
                          reinterpret_cast<uintptr_t>(params.weight) % kVectorBytes == 0;
  require(is_aligned, kOp, "hidden and x's stride must be multiples of 4, pointers 16-byte aligned");
  dispatch_dtype(params.dtype, kOp, [&](auto dtype) {
    dispatch_experts(params.choice, kOp, [&](auto items) {
      launch<typename decltype(dtype)::Type, decltype(items)::kItems>(params, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace headway::cuda
