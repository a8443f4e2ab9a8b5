// RMS norm over groups of y * silu(z), the norm behind a Mamba-2 mixer. One block a (token, group), the gated values in
// registers between the two passes. The block size depends on the group's width alone.
#include "cuda/common/chained.cuh"
#include "cuda/common/math.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/row_shape.h"
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "gated_rms_norm";

template <typename T, int kWidth, int kItems>
__global__ void __launch_bounds__(max_row_threads(kItems, kWidth)) gated_rms_norm_kernel(GatedRmsNormParams params) {
  allow_next_kernel();
  __shared__ float scratch[kWarpSize];
  const int64_t num_groups = params.hidden / params.group_size;
  const int64_t token = blockIdx.x / num_groups;
  const int64_t group_begin = (blockIdx.x - token * num_groups) * params.group_size;
  const int num_pieces = static_cast<int>(params.group_size / kWidth);
  const T* y = static_cast<const T*>(params.y) + token * params.hidden + group_begin;
  const T* z = static_cast<const T*>(params.z) + token * params.z_stride + group_begin;

  wait_for_previous_kernel();
  float values[kItems][kWidth];
  float sum = 0.0f;
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int piece = item * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (piece >= num_pieces) break;
    float gate[kWidth];
    load_floats<T, kWidth>(y + piece * kWidth, values[item]);
    load_floats<T, kWidth>(z + piece * kWidth, gate);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[item][i] *= sizeof(T) == 4 ? silu(gate[i]) : fast_silu(gate[i]);
      sum = fmaf(values[item][i], values[item][i], sum);
    }
  }

  const float scale = rsqrtf(block_sum(sum, scratch) / static_cast<float>(params.group_size) + params.eps);

  T* out = static_cast<T*>(params.out) + token * params.hidden + group_begin;
  const T* weight = static_cast<const T*>(params.weight) + group_begin;
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
void launch(const GatedRmsNormParams& params, int threads, cudaStream_t stream) {
  const int64_t num_blocks = params.num_tokens * (params.hidden / params.group_size);
  require(num_blocks <= INT32_MAX, kOp, "num_tokens * num_groups is too large for one launch");
  launch_chained(kOp, gated_rms_norm_kernel<T, kWidth, kItems>, dim3(static_cast<unsigned>(num_blocks)), threads,
                 stream, params);
}

template <typename T, int kWidth>
void launch_width(const GatedRmsNormParams& params, cudaStream_t stream) {
  dispatch_row_shape<kWidth>(params.group_size, kOp, [&](auto items, int threads) {
    launch<T, kWidth, decltype(items)::value>(params, threads, stream);
  });
}

}  // namespace

void gated_rms_norm(const GatedRmsNormParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.hidden == 0) return;
  require(params.group_size > 0 && params.hidden % params.group_size == 0, kOp, "group_size must divide hidden");
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool is_aligned = is_vectorisable<T>(params.y, params.hidden, params.group_size) &&
                            is_vectorisable<T>(params.z, params.z_stride, params.group_size) &&
                            is_vectorisable<T>(params.weight, params.hidden, params.group_size) &&
                            is_vectorisable<T>(params.out, params.hidden, params.group_size);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (is_aligned) {
      launch_width<T, kVectorWidth<T>>(params, cuda_stream);
    } else {
      launch_width<T, 1>(params, cuda_stream);
    }
  });
}

}  // namespace headway::cuda
