// The device clock of the result ring's timestamps.
#pragma once

#include <cstdint>

namespace headway::cuda {

// Nanoseconds of the clock that all of a device's multiprocessors share; it ticks coarsely (32 ns to 1 us).
__device__ __forceinline__ int64_t device_clock_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return static_cast<int64_t>(now);
}

}  // namespace headway::cuda
