// RMS norm of each token, alone or after adding to the residual stream. One block a token; the token stays in registers
// between the two passes, so each input is read once. The block size depends on the width alone, so a token's result
// does not depend on its batch.
#include "cuda/common/chained.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/row_shape.h"
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "rms_norm";

template <typename T, int kWidth, int kItems, bool kHasResidual>
__global__ void __launch_bounds__(max_row_threads(kItems, kWidth)) rms_norm_kernel(RmsNormParams params) {
  allow_next_kernel();
  wait_for_previous_kernel();
  __shared__ float scratch[kWarpSize];
  const int64_t token = blockIdx.x;
  const int num_pieces = static_cast<int>(params.hidden / kWidth);
  const T* x = static_cast<const T*>(params.x) + token * params.x_stride;
  T* residual = static_cast<T*>(params.residual) + token * params.hidden;

  // Load, add, sum the squares. What is normalised is the residual as stored, rounded to its dtype.
  float values[kItems][kWidth];
  float sum = 0.0f;
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int piece = item * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (piece >= num_pieces) break;
    load_floats<T, kWidth>(x + piece * kWidth, values[item]);
    if constexpr (kHasResidual) {
      float old[kWidth];
      load_floats<T, kWidth>(residual + piece * kWidth, old);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const T rounded = from_float<T>(fmaf(params.residual_scale, values[item][i], old[i]));
        values[item][i] = to_float(rounded);
      }
      store_floats<T, kWidth>(residual + piece * kWidth, values[item]);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum = fmaf(values[item][i], values[item][i], sum);
  }

  const float scale = rsqrtf(block_sum(sum, scratch) / static_cast<float>(params.hidden) + params.eps);

  T* out = static_cast<T*>(params.out) + token * params.hidden;
  const T* weight = static_cast<const T*>(params.weight);
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int piece = item * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (piece >= num_pieces) break;
    float weights[kWidth];
    load_floats<T, kWidth>(weight + piece * kWidth, weights);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) weights[i] *= values[item][i] * scale;
    store_floats<T, kWidth>(out + piece * kWidth, weights);
  }
}

template <typename T, int kWidth, int kItems>
void launch(const RmsNormParams& params, int threads, cudaStream_t stream) {
  const auto num_blocks = static_cast<unsigned>(params.num_tokens);
  if (params.residual != nullptr) {
    launch_chained(kOp, rms_norm_kernel<T, kWidth, kItems, true>, dim3(num_blocks), threads, stream, params);
  } else {
    launch_chained(kOp, rms_norm_kernel<T, kWidth, kItems, false>, dim3(num_blocks), threads, stream, params);
  }
}

template <typename T, int kWidth>
void launch_width(const RmsNormParams& params, cudaStream_t stream) {
  dispatch_row_shape<kWidth>(params.hidden, kOp, [&](auto items, int threads) {
    launch<T, kWidth, decltype(items)::value>(params, threads, stream);
  });
}

}  // namespace

void rms_norm(const RmsNormParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.hidden == 0) return;
  require(params.num_tokens <= INT32_MAX, kOp, "num_tokens is too large for one launch");
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool is_aligned = is_vectorisable<T>(params.x, params.x_stride, params.hidden) &&
                            is_vectorisable<T>(params.residual, params.hidden, params.hidden) &&
                            is_vectorisable<T>(params.weight, params.hidden, params.hidden) &&
                            is_vectorisable<T>(params.out, params.hidden, params.hidden);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (is_aligned) {
      launch_width<T, kVectorWidth<T>>(params, cuda_stream);
    } else {
      launch_width<T, 1>(params, cuda_stream);
    }
  });
}

}  // namespace headway::cuda
