// RMS norm over groups of y * silu(z), the norm behind a Mamba-2 mixer. A team of threads has one token's group, the
// gated values in registers between the two passes. Its size, and so the order of the sum, depends on the group's width
// alone. Small teams share blocks: the device starts so many blocks a microsecond and no more.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/row_shape.h"
#include "cuda/gated_norm.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "gated_rms_norm";
constexpr int kMinBlockThreads = 256;

// Over the threads of a team, in the order of block_sum over a block of as many. The whole block calls it.
__device__ __forceinline__ float team_sum(float value, float* scratch, int team_warps) {
  value = warp_sum(value);
  if (team_warps == 1) return value;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_sum(lane < team_warps ? scratch[warp / team_warps * team_warps + lane] : 0.0f);
}

template <typename T, int kWidth, int kItems>
__global__ void __launch_bounds__(max_row_threads(kItems, kWidth))
    gated_rms_norm_kernel(GatedRmsNormParams params, unsigned num_groups, unsigned team_threads) {
  allow_next_kernel();
  __shared__ float scratch[kWarpSize];
  const auto num_threads = static_cast<int>(team_threads);
  const auto thread = static_cast<int>(threadIdx.x % team_threads);
  const unsigned index = blockIdx.x * (blockDim.x / team_threads) + threadIdx.x / team_threads;
  const int64_t token = index / num_groups;  // of 32 bits: one of 64 is a subroutine
  const int64_t group_begin = (index - token * num_groups) * params.group_size;
  const int num_pieces = token < params.num_tokens ? static_cast<int>(params.group_size / kWidth) : 0;
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
  float values[kItems][kWidth];
  float sum = 0.0f;
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int piece = item * num_threads + thread;
    if (piece >= num_pieces) break;
    sum = gate_piece(*reinterpret_cast<const Vector<T, kWidth>*>(y + piece * kWidth),
                     *reinterpret_cast<const Vector<T, kWidth>*>(z + piece * kWidth), values[item], sum);
  }

  const float total = team_sum(sum, scratch, num_threads / kWarpSize);
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
  dispatch_row_shape<kWidth>(params.group_size, kOp, [&](auto items, int team_threads) {
    const int teams = std::max(kMinBlockThreads / team_threads, 1);  // of a block
    launch_chained(kOp, gated_rms_norm_kernel<T, kWidth, decltype(items)::value>,
                   dim3(static_cast<unsigned>((num_groups + teams - 1) / teams)), teams * team_threads, stream, params,
                   token_groups, static_cast<unsigned>(team_threads));
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
