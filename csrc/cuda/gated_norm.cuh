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
  float gates[kWidth];
  to_floats(y, values);
  to_floats(z, gates);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    values[i] = __fmul_rn(values[i], sizeof(T) == 4 ? silu(gates[i]) : fast_silu(gates[i]));
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
  float weights[kWidth];
  to_floats(weight, weights);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) weights[i] *= values[i] * scale;
  store_floats<T, kWidth>(out, weights);
}

}  // namespace headway::cuda
