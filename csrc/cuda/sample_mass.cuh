// Masses of a row that is drawn from as a whole: exp(logit / temperature) as a whole number of units. A piece's unit is
// a power of two chosen by its own largest logit, so that it can be summed before the row's largest is known, and
// pieces compare by shifts. Bins are 16 to a factor of two, so those of one piece are those of another, displaced.
#pragma once

#include "cuda/sample_scan.cuh"

namespace headway::cuda {

inline constexpr int kBinShift = 19;  // of a float's bits: 16 bins to an octave
inline constexpr int kBinsPerOctave = 1 << (23 - kBinShift);
inline constexpr float kMassTop = 2147483648.0f;  // 2^31: the most that one value weighs
inline constexpr float kMaxPower = 4194304.0f;  // 2^22: beyond, exponents are no whole numbers
inline constexpr float kMaxFactor = 1e30f;  // of a logit, so that products with it are finite or infinite, not NaN
inline constexpr float kMaxShift = 63.0f;
static_assert(kMaxShift * kBinsPerOctave >= kMassBins, "pieces without mass have no bin in the row's range");

// By top_p or min_p.
__device__ __forceinline__ bool is_cut(const RowSampling& sampling) {
  return sampling.top_p < 1.0f || sampling.min_p > 0.0f;
}

// weight(logit) = 2^(logit * scale + offset).
struct MassScale {
  float scale;
  float offset;

  __device__ float weight(float logit) const {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(fmaf(logit, scale, offset)));
    return fminf(value, kMassTop);
  }
};

__device__ __forceinline__ uint32_t units_of(float weight) {
  return __float2uint_rn(weight);
}

// Higher weights in lower bins.
__device__ __forceinline__ int mass_bin(float weight) {
  const uint32_t below = (__float_as_uint(kMassTop) - __float_as_uint(weight)) >> kBinShift;
  return static_cast<int>(min(below, static_cast<uint32_t>(kMassBins - 1)));
}

__device__ __forceinline__ float mass_scale(float temperature) {
  return 1.4426950408889634f / temperature;
}

// The least whole number that no exponent of the piece exceeds.
__device__ __forceinline__ float mass_exponent(float largest, float scale) {
  const float exponent = ceilf(largest * scale);
  return fmaf(largest, scale, -exponent) > 0.0f ? exponent + 1.0f : exponent;
}

}  // namespace headway::cuda
