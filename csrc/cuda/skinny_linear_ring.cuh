// What the products of few tokens on the copy engine share: the ring of shared memory that panels pass through.
#pragma once

#include <cstdint>

namespace headway::cuda::skinny {

inline constexpr int kMaxStages = 32;

// A slot of the ring, and which time round it is.
struct RingSlot {
  int index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int num_stages) {
    if (++index < num_stages) return;
    index = 0;
    parity ^= 1;
  }
};

struct Barriers {
  alignas(8) uint64_t full[kMaxStages];
  uint64_t free[kMaxStages];
};

}  // namespace headway::cuda::skinny
