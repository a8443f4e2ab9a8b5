// The pretend language model: the next token is a hash of the request's seed and all tokens so far. A function of
// content alone, so that whatever the schedule, a stream has one right continuation. The seed's low bits say how a
// request misbehaves.
#pragma once

#include <cstdint>

#include "tests/sim/rng.h"

namespace headway::sim {

inline constexpr uint64_t kMayGoBad = 1;      // some of its logits are NaN
inline constexpr uint64_t kHostMayStop = 2;   // its text holds stop strings, which only the host sees

// A sequence so far, as one number.
class Context {
 public:
  Context() = default;
  explicit Context(uint64_t seed) : seed_(seed), hash_(mix(seed)) {}

  void append(int32_t token) { hash_ = mix(hash_ + 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(token) + 1)); }
  int32_t next_token(int32_t vocab_size) const {
    return static_cast<int32_t>((hash_ >> 8) % static_cast<uint64_t>(vocab_size));
  }
  bool is_bad() const { return (seed_ & kMayGoBad) != 0 && hash_ % 16 == 0; }
  bool ends_stop_string() const { return (seed_ & kHostMayStop) != 0 && hash_ % 16 == 1; }
  // Outputs that a stop string takes back, its own included.
  int32_t num_cut_tokens() const { return static_cast<int32_t>(hash_ >> 4 & 1); }
  bool operator==(const Context&) const = default;

 private:
  uint64_t seed_ = 0;
  uint64_t hash_ = 0;
};

}  // namespace headway::sim
