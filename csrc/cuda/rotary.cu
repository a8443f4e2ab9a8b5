// Rotary position embedding in place. One block a token, threads over (head, pair); a pair's two channels are read and
// written by one thread, so nothing overlaps.
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "rotary";
constexpr int kThreads = 256;

// kWidth neighbouring pairs (i, i + half) of one head.
template <typename T, int kWidth>
__device__ void rotate(T* head, int pair, int half, const float* cos_sin) {
  float first[kWidth], second[kWidth], cosine[kWidth], sine[kWidth];
  load_floats<T, kWidth>(head + pair, first);
  load_floats<T, kWidth>(head + pair + half, second);
  load_floats<float, kWidth>(cos_sin + pair, cosine);
  load_floats<float, kWidth>(cos_sin + half + pair, sine);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float x = first[i];
    first[i] = x * cosine[i] - second[i] * sine[i];
    second[i] = second[i] * cosine[i] + x * sine[i];
  }
  store_floats<T, kWidth>(head + pair, first);
  store_floats<T, kWidth>(head + pair + half, second);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) rotary_kernel(RotaryParams params) {
  const int64_t token = blockIdx.x;
  const int half = params.rotary_dim / 2;
  const int pieces = half / kWidth;
  const int num_items = (params.num_heads + params.num_kv_heads) * pieces;
  const float* cos_sin = params.cos_sin + static_cast<int64_t>(params.positions[token]) * params.rotary_dim;
  T* q = static_cast<T*>(params.q) + token * params.q_stride;
  T* k = static_cast<T*>(params.k) + token * params.k_stride;
  for (int item = static_cast<int>(threadIdx.x); item < num_items; item += kThreads) {
    const int head = item / pieces;
    const int pair = item % pieces * kWidth;
    T* channels =
        head < params.num_heads ? q + head * params.head_dim : k + (head - params.num_heads) * params.head_dim;
    rotate<T, kWidth>(channels, pair, half, cos_sin);
  }
}

// Pairs a thread takes at once: four neighbours where every access stays aligned.
template <typename T>
bool takes_four(const RotaryParams& params) {
  const auto is_aligned = [&](const void* base, int64_t stride) {
    return reinterpret_cast<uintptr_t>(base) % (4 * sizeof(T)) == 0 && stride % 4 == 0;
  };
  return is_aligned(params.q, params.q_stride) && is_aligned(params.k, params.k_stride) &&
         reinterpret_cast<uintptr_t>(params.cos_sin) % kVectorBytes == 0 && params.head_dim % 4 == 0 &&
         params.rotary_dim % 8 == 0;
}

}  // namespace

void rotary(const RotaryParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.rotary_dim == 0) return;
  require(params.num_tokens <= INT32_MAX, kOp, "num_tokens is too large for one launch");
  const auto num_blocks = static_cast<unsigned>(params.num_tokens);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (takes_four<T>(params)) {
      rotary_kernel<T, 4><<<num_blocks, kThreads, 0, cuda_stream>>>(params);
    } else {
      rotary_kernel<T, 1><<<num_blocks, kThreads, 0, cuda_stream>>>(params);
    }
  });
  check_launch(kOp);
}

}  // namespace headway::cuda
