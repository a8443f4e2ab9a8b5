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

// 2^x by the hardware's approximation; exact for 0 and -inf.
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The inverse; -inf for 0.
__device__ __forceinline__ float fast_log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// For 16-bit outputs. exp(-x) overflows to inf below -88: the quotient is then -0, the right limit. Where fast_exp2
// flushes, 1 + exp(-x) is 1 either way: the bits are those of __expf, which takes three instructions more for it.
__device__ __forceinline__ float fast_silu(float value) {
  return __fdividef(value, 1.0f + fast_exp2(value * -1.44269504f));
}

}  // namespace headway::cuda
