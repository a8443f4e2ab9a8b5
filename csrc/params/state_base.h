// How far the state that a row's slot holds has come. Host and device code alike.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HEADWAY_HOST_DEVICE __host__ __device__
#else
#define HEADWAY_HOST_DEVICE
#endif

namespace headway {

// Tokens folded into the state that a step leaves in the row's slot, when the row has num_computed tokens after it:
// states are kept in place, so that they have always seen every token.
HEADWAY_HOST_DEVICE constexpr int32_t next_state_base(int32_t num_computed) {
  return num_computed;
}

}  // namespace headway
