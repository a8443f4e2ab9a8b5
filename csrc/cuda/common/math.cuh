// Scalar functions shared by the kernels, in fp32. expf and log1pf keep full fp32 accuracy; the fast_ forms use the
// hardware's exponential (2 ulp around zero, relative error growing with |x|: about 2^-21 at |x| = 8).
#pragma once

#include <cuda_runtime.h>

namespace headway::cuda {

__device__ __forceinline__ float infinity() {
  return __int_as_float(0x7f800000);
}

inline constexpr float kSoftplusThreshold = 20.0f;

__device__ __forceinline__ float softplus(float value) {
  return value > kSoftplusThreshold ? value : log1pf(expf(value));
}

__device__ __forceinline__ float silu(float value) {
  return value / (1.0f + expf(-value));
}

// The exact form, by the error function.
__device__ __forceinline__ float gelu(float value) {
  return 0.5f * value * (1.0f + erff(value * 0.70710678f));
}

// For 16-bit outputs. exp(-x) overflows to inf below -88: the quotient is then -0, the right limit.
__device__ __forceinline__ float fast_silu(float value) {
  return __fdividef(value, 1.0f + __expf(-value));
}

}  // namespace headway::cuda
