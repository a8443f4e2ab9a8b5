// The pretend language model: the next token is a hash of the request's seed and all tokens so far. A function of
// content alone, so that whatever the schedule, a stream has one right continuation. The seed's low bits say how a
// request misbehaves, and whose prefixes it may share: what is computed for a token depends on its salt.
#pragma once

#include <cstdint>

#include "tests/sim/rng.h"

namespace headway::sim {

inline constexpr uint64_t kMayGoBad = 1;      // some of its logits are NaN
inline constexpr uint64_t kHostMayStop = 2;   // its text holds stop strings, which only the host sees
inline constexpr uint64_t kHasSalt = 4;

inline const char* salt_of(uint64_t seed) {
  return (seed & kHasSalt) != 0 ? "tenant" : "";
}

// A sequence so far, as one number.
class Context {
 public:
  Context() = default;
  explicit Context(uint64_t seed) : seed_(seed), content_(mix(1 + (seed & kHasSalt))) {}

  Context(uint64_t seed, uint64_t content) : seed_(seed), content_(content) {}

  void append(int32_t token) { content_ = extend(content_, token); }
  int32_t next_token(int32_t vocab_size) const {
    return static_cast<int32_t>((draw() >> 8) % static_cast<uint64_t>(vocab_size));
  }
  bool is_bad() const { return (seed_ & kMayGoBad) != 0 && draw() % 16 == 0; }
  bool ends_stop_string() const { return (seed_ & kHostMayStop) != 0 && draw() % 16 == 1; }
  // Outputs that a stop string takes back, its own included.
  int32_t num_cut_tokens() const { return static_cast<int32_t>(draw() >> 4 & 1); }
  // What the caches hold of it: the same for all requests of a salt that begin alike.
  uint64_t content() const { return content_; }
  static uint64_t extend(uint64_t content, int32_t token) {
    return mix(content + 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(token) + 1));
  }

 private:
  uint64_t draw() const { return mix(content_ ^ mix(seed_)); }

  uint64_t seed_ = 0;
  uint64_t content_ = 0;
};

}  // namespace headway::sim
