// The activation functions per vector, chosen at compile time.
#pragma once

#include <cmath>

#include "cpu/math.h"
#include "params/moe.h"

namespace headway::cpu::HEADWAY_SIMD {

inline F32 gelu(F32 x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] *= 0.5f + 0.5f * std::erf(x[lane] * 0.70710678118654752f);
  return x;
}

template <Activation kKind>
inline F32 activate(F32 x) {
  if constexpr (kKind == Activation::kSilu) {
    return silu(x);
  } else if constexpr (kKind == Activation::kRelu2) {
    const F32 positive = x < 0.0f ? F32{} : x;
    return positive * positive;
  } else {
    return gelu(x);
  }
}

template <Activation kKind>
struct Kind {};

// Calls run(Kind<kKind>{}).
template <class Run>
inline void with_activation(Activation kind, const Run& run) {
  switch (kind) {
    case Activation::kSilu:
      return run(Kind<Activation::kSilu>{});
    case Activation::kRelu2:
      return run(Kind<Activation::kRelu2>{});
    case Activation::kGelu:
      return run(Kind<Activation::kGelu>{});
  }
}

}  // namespace headway::cpu::HEADWAY_SIMD
