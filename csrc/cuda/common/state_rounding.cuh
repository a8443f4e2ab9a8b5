// Rounds states in registers to the values that fp16 slots hold (core/state_rounding.h).
#pragma once

#include <cuda_fp16.h>

#include "core/state_rounding.h"

namespace headway::cuda {

__device__ __forceinline__ float round_to_half(float value, uint32_t random_bits) {
  return __half2float(__ushort_as_half(round_state(value, random_bits)));
}

// Neighbours from an even element of the slot on; each pair shares one random word.
template <int kCount>
__device__ __forceinline__ void round_states(const StateRounding& rounding, uint32_t element, float (&values)[kCount]) {
  static_assert(kCount % 2 == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const uint32_t random = rounding.pair_bits((element + i) / 2);
    values[i] = round_to_half(values[i], random);
    values[i + 1] = round_to_half(values[i + 1], random >> 16);
  }
}

}  // namespace headway::cuda
