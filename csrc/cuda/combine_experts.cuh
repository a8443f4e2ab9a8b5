// The weighted sum over each token's experts. One block a token; each result is read once.
#pragma once

#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"
#include "params/moe.h"

namespace headway::cuda {

inline constexpr char kCombineExpertsOp[] = "combine_experts";
inline constexpr int kMaxCombineThreads = 384;

// R: of the results; T: of the sums.
template <typename R, typename T, int kWidth>
__global__ void __launch_bounds__(kMaxCombineThreads)
    combine_kernel(const __grid_constant__ CombineExpertsParams params) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x;
  const float* weights = params.weights + token * params.top_k;
  const auto* results = static_cast<const R*>(params.results);
  T* out = static_cast<T*>(params.out) + token * params.hidden;
  for (int column = static_cast<int>(threadIdx.x) * kWidth; column < params.hidden;
       column += static_cast<int>(blockDim.x) * kWidth) {
    float sums[kWidth] = {};
#pragma unroll 4
    for (int k = 0; k < params.top_k; ++k) {
      const int64_t pair = token * params.top_k + k;
      const int64_t place = params.places == nullptr ? pair : params.places[pair];
      float values[kWidth];
      load_floats<R, kWidth>(results + place * params.hidden + column, values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[i] = fmaf(weights[k], values[i], sums[i]);
    }
    store_floats<T, kWidth>(out + column, sums);
  }
}

template <typename R, typename T, int kWidth>
void launch_combine_width(const CombineExpertsParams& params, cudaStream_t stream) {
  const int num_warps = (params.hidden / kWidth + kWarpSize - 1) / kWarpSize;
  const int num_threads = std::min(kMaxCombineThreads, std::max(1, num_warps) * kWarpSize);
  launch_chained(kCombineExpertsOp, combine_kernel<R, T, kWidth>, dim3(static_cast<unsigned>(params.num_tokens)),
                 num_threads, stream, params);
}

template <typename R, typename T>
void launch_combine(const CombineExpertsParams& params, cudaStream_t stream) {
  constexpr int kWidth = std::min(kVectorWidth<R>, kVectorWidth<T>);
  if (is_vectorisable<R>(params.results, params.hidden, params.hidden) &&
      is_vectorisable<T>(params.out, params.hidden, params.hidden)) {
    launch_combine_width<R, T, kWidth>(params, stream);
  } else {
    launch_combine_width<R, T, 1>(params, stream);
  }
}

}  // namespace headway::cuda
