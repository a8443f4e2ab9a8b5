// Division of small numbers by one that the host knows: a multiplication instead of some twenty instructions.
#pragma once

#include <cstdint>

namespace headway::cuda {

// 32-bit rounded-up reciprocal: n / d is exact while n * d < 2^32 (Granlund and Montgomery, "Division by invariant
// integers using multiplication", 1994). d > 1; 1 is divided by as 0.
struct Reciprocal {
  uint32_t multiplier;

  explicit Reciprocal(int divisor)
      : multiplier(divisor == 1 ? 0 : static_cast<uint32_t>((uint64_t{1} << 32) / static_cast<uint32_t>(divisor) + 1)) {
  }

  __device__ __forceinline__ int divide(int n) const {
    return multiplier == 0 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), multiplier));
  }
};

}  // namespace headway::cuda
