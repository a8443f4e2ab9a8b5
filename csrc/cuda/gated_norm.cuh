// RMS norm over a group of y * silu(z), piece by piece of 16 bytes: what every kernel that does it has in common.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"

namespace headway::cuda {

template <typename T>
using NormPiece = Vector<T, kVectorWidth<T>>;

// values = y * silu(z); returns sum + their squares. Pieces come by value: of one that is passed by reference to memory
// the compiler loads each element apart.
template <typename T, int kWidth>
__device__ __forceinline__ float gate_piece(Vector<T, kWidth> y, Vector<T, kWidth> z, float (&values)[kWidth],
                                            float sum) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float gate = to_float(z.values[i]);
    values[i] = __fmul_rn(to_float(y.values[i]), sizeof(T) == 4 ? silu(gate) : fast_silu(gate));
    sum = fmaf(values[i], values[i], sum);
  }
  return sum;
}

__device__ __forceinline__ float norm_scale(float sum_of_squares, int64_t group_size, float eps) {
  return rsqrtf(__fdiv_rn(sum_of_squares, static_cast<float>(group_size)) + eps);
}

template <typename T, int kWidth>
__device__ __forceinline__ void store_normalised(T* out, Vector<T, kWidth> weight, const float (&values)[kWidth],
                                                 float scale) {
  Vector<T, kWidth> result;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    result.values[i] = from_float<T>(to_float(weight.values[i]) * (values[i] * scale));
  }
  *reinterpret_cast<Vector<T, kWidth>*>(out) = result;
}

}  // namespace headway::cuda
