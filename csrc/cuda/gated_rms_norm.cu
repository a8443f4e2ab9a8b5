// RMS norm over groups of y * silu(z), the norm behind a Mamba-2 mixer. One block a (token, group), or one warp where
// that is enough, the gated values in registers between the two passes. Which of them depends on the group's width.
#include "cuda/common/chained.cuh"
#include "cuda/common/row_shape.h"
#include "cuda/gated_norm.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "gated_rms_norm";
constexpr int kBlockWarps = 8;  // groups of a block where a group is a warp's: blocks of one warp leave slots empty

// A group is the block's, or where kIsWarps one warp's.
template <typename T, int kWidth, int kItems, bool kIsWarps>
__global__ void __launch_bounds__(max_row_threads(kItems, kWidth))
    gated_rms_norm_kernel(GatedRmsNormParams params, unsigned num_groups) {
  allow_next_kernel();
  __shared__ float scratch[kWarpSize];
  const int num_threads = kIsWarps ? kWarpSize : static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x) % num_threads;
  const unsigned index = kIsWarps ? blockIdx.x * kBlockWarps + threadIdx.x / kWarpSize : blockIdx.x;
  const int64_t token = index / num_groups;  // of 32 bits: one of 64 is a subroutine
  const int64_t group_begin = (index - token * num_groups) * params.group_size;
  const int num_pieces = static_cast<int>(params.group_size / kWidth);
  const T* y = static_cast<const T*>(params.y) + token * params.hidden + group_begin;
  const T* z = static_cast<const T*>(params.z) + token * params.z_stride + group_begin;
  const T* weight = static_cast<const T*>(params.weight) + group_begin;

  Vector<T, kWidth> weights[kItems];  // no kernel writes them: loaded before the one ahead is over
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int piece = item * num_threads + thread;
    if (piece < num_pieces) weights[item] = *reinterpret_cast<const Vector<T, kWidth>*>(weight + piece * kWidth);
  }
  wait_for_previous_kernel();
  if (kIsWarps && token >= params.num_tokens) return;
  float values[kItems][kWidth];
  float sum = 0.0f;
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int piece = item * num_threads + thread;
    if (piece >= num_pieces) break;
    sum = gate_piece(*reinterpret_cast<const Vector<T, kWidth>*>(y + piece * kWidth),
                     *reinterpret_cast<const Vector<T, kWidth>*>(z + piece * kWidth), values[item], sum);
  }

  const float total = kIsWarps ? warp_sum(sum) : block_sum(sum, scratch);
  const float scale = norm_scale(total, params.group_size, params.eps);

  T* out = static_cast<T*>(params.out) + token * params.hidden + group_begin;
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int piece = item * num_threads + thread;
    if (piece >= num_pieces) break;
    store_normalised(out + piece * kWidth, weights[item], values[item], scale);
  }
}

template <typename T, int kWidth>
void launch_width(const GatedRmsNormParams& params, cudaStream_t stream) {
  const auto token_groups = static_cast<unsigned>(params.hidden / params.group_size);
  const int64_t num_groups = params.num_tokens * token_groups;
  require(num_groups <= INT32_MAX, kOp, "num_tokens * num_groups is too large for one launch");
  if (params.group_size <= kWidth * kWarpSize) {
    const auto num_blocks = static_cast<unsigned>((num_groups + kBlockWarps - 1) / kBlockWarps);
    launch_chained(kOp, gated_rms_norm_kernel<T, kWidth, 1, true>, dim3(num_blocks), kBlockWarps * kWarpSize, stream,
                   params, token_groups);
    return;
  }
  dispatch_row_shape<kWidth>(params.group_size, kOp, [&](auto items, int threads) {
    launch_chained(kOp, gated_rms_norm_kernel<T, kWidth, decltype(items)::value, false>,
                   dim3(static_cast<unsigned>(num_groups)), threads, stream, params, token_groups);
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
