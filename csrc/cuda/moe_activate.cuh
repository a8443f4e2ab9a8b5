// The activation between the experts' two products.
#pragma once

#include "cuda/common/math.cuh"
#include "params/moe.h"

namespace headway::cuda {

__device__ __forceinline__ float activate(Activation activation, float value) {
  switch (activation) {
    case Activation::kSilu:
      return silu(value);
    case Activation::kGelu:
      return gelu(value);
    default: {
      const float positive = value < 0.0f ? 0.0f : value;  // NaN stays
      return positive * positive;
    }
  }
}

}  // namespace headway::cuda
