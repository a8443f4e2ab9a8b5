// How far the state that a row's slot holds has come. Host and device code alike.
//
// States kept in place have seen every token. Over a window of W tokens the state in a slot lags behind, at a base, and
// a log holds the inputs since. What a token sees is always computed from the state folded up to its canonical base,
// the last multiple of W (or where the log began, if that is later), so that it depends on positions alone.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HEADWAY_HOST_DEVICE __host__ __device__
#else
#define HEADWAY_HOST_DEVICE
#endif

namespace headway {

struct StateWindow {
  int32_t num_tokens = 0;  // W; 0: states are kept in place
  int32_t max_rewind = 0;  // positions that a row may go back; at least 1 with a window
};

// Of the token at `position`, when the slot's state is at `base`.
HEADWAY_HOST_DEVICE constexpr int32_t canonical_base(int32_t base, int32_t position, int32_t window) {
  const int32_t start = position / window * window;
  return base > start ? base : start;
}

// Where a step that computes tokens [start, end) leaves the state: at the canonical base that a row set back by
// max_rewind still needs. The first step after a prompt leaves it alone: that one reads the convolution columns that
// moving the base replaces.
HEADWAY_HOST_DEVICE constexpr int32_t next_state_base(int32_t base, int32_t start, int32_t end,
                                                      const StateWindow& window) {
  if (window.num_tokens == 0) return end;
  const int32_t kept = end - window.max_rewind;
  return start <= base || kept <= base ? base : canonical_base(base, kept, window.num_tokens);
}

}  // namespace headway
