// The weighted sum over each token's experts, of results that lie in the experts' order. One block a token; each result
// is read once.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "combine_experts";
constexpr int kMaxThreads = 384;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads) combine_kernel(const __grid_constant__ CombineExpertsParams params) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x;
  const int32_t* places = params.places + token * params.top_k;
  const float* weights = params.weights + token * params.top_k;
  const auto* results = static_cast<const T*>(params.results);
  T* out = static_cast<T*>(params.out) + token * params.hidden;
  for (int column = static_cast<int>(threadIdx.x) * kWidth; column < params.hidden;
       column += static_cast<int>(blockDim.x) * kWidth) {
    float sums[kWidth] = {};
#pragma unroll 4
    for (int k = 0; k < params.top_k; ++k) {
      float values[kWidth];
      load_floats<T, kWidth>(results + int64_t{places[k]} * params.hidden + column, values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[i] = fmaf(weights[k], values[i], sums[i]);
    }
    store_floats<T, kWidth>(out + column, sums);
  }
}

template <typename T, int kWidth>
void launch(const CombineExpertsParams& params, cudaStream_t stream) {
  const int num_warps = (params.hidden / kWidth + kWarpSize - 1) / kWarpSize;
  const int num_threads = std::min(kMaxThreads, std::max(1, num_warps) * kWarpSize);
  launch_chained(kOp, combine_kernel<T, kWidth>, dim3(static_cast<unsigned>(params.num_tokens)), num_threads, stream,
                 params);
}

}  // namespace

void combine_experts(const CombineExpertsParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.hidden == 0) return;
  require(params.num_tokens <= INT32_MAX, kOp, "num_tokens is too large for one launch");
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (is_vectorisable<T>(params.results, params.hidden, params.hidden) &&
        is_vectorisable<T>(params.out, params.hidden, params.hidden)) {
      launch<T, kVectorWidth<T>>(params, cuda_stream);
    } else {
      launch<T, 1>(params, cuda_stream);
    }
  });
}

}  // namespace headway::cuda
