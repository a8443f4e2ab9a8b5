// Elementwise activations of MLPs, plain or gated. One thread makes one 16-byte piece of the output (one element where
// the rows are not 16-byte aligned). Knows nothing of experts: a batch of experts is just more tokens.
#include "cuda/common/chained.cuh"
#include "cuda/common/math.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "activation";
constexpr int kThreads = 256;

template <Activation kKind>
__device__ __forceinline__ float activate(float value) {
  if constexpr (kKind == Activation::kSilu) return silu(value);
  if constexpr (kKind == Activation::kRelu2) return value > 0.0f ? value * value : (isnan(value) ? value : 0.0f);
  return gelu(value);
}

template <typename T, Activation kKind, bool kIsGated, int kWidth>
__global__ void __launch_bounds__(kThreads) activation_kernel(ActivationParams params) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t pieces_per_row = params.width / kWidth;
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= params.num_tokens * pieces_per_row) return;
  const int64_t token = piece / pieces_per_row;
  const int64_t column = (piece - token * pieces_per_row) * kWidth;

  const T* x = static_cast<const T*>(params.x) + token * params.x_stride + column;
  float values[kWidth];
  load_floats<T, kWidth>(x, values);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = activate<kKind>(values[i]);
  if constexpr (kIsGated) {
    float up[kWidth];
    load_floats<T, kWidth>(x + params.width, up);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] *= up[i];
  }
  store_floats<T, kWidth>(static_cast<T*>(params.out) + token * params.width + column, values);
}

template <typename T, Activation kKind, bool kIsGated, int kWidth>
void launch(const ActivationParams& params, cudaStream_t stream) {
  const int64_t num_pieces = params.num_tokens * (params.width / kWidth);
  const int64_t num_blocks = (num_pieces + kThreads - 1) / kThreads;
  require(num_blocks <= INT32_MAX, kOp, "num_tokens * width is too large for one launch");
  launch_chained(kOp, activation_kernel<T, kKind, kIsGated, kWidth>, dim3(static_cast<unsigned>(num_blocks)), kThreads,
                 stream, params);
}

template <typename T, Activation kKind, bool kIsGated>
void launch_aligned(const ActivationParams& params, cudaStream_t stream) {
  const bool is_aligned = is_vectorisable<T>(params.x, params.x_stride, params.width) &&
                          is_vectorisable<T>(params.out, params.width, params.width);
  if (is_aligned) {
    launch<T, kKind, kIsGated, kVectorWidth<T>>(params, stream);
  } else {
    launch<T, kKind, kIsGated, 1>(params, stream);
  }
}

template <typename T, Activation kKind>
void launch_kind(const ActivationParams& params, cudaStream_t stream) {
  if (params.is_gated) {
    launch_aligned<T, kKind, true>(params, stream);
  } else {
    launch_aligned<T, kKind, false>(params, stream);
  }
}

}  // namespace

void activation(const ActivationParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.width == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    switch (params.activation) {
      case Activation::kSilu:
        return launch_kind<T, Activation::kSilu>(params, cuda_stream);
      case Activation::kRelu2:
        return launch_kind<T, Activation::kRelu2>(params, cuda_stream);
      case Activation::kGelu:
        return launch_kind<T, Activation::kGelu>(params, cuda_stream);
    }
    require(false, kOp, "unknown activation");
  });
}

}  // namespace headway::cuda
