// A small random generator whose sequence is the same everywhere, unlike std::uniform_int_distribution's.
#pragma once

#include <cstdint>

namespace headway::sim {

// splitmix64's finaliser: every bit of the result depends on every bit of the input.
constexpr uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

class Rng {
 public:
  explicit Rng(uint64_t seed) : state_(mix(seed + 1)) {}

  uint64_t bits() { return mix(state_ += 0x9e3779b97f4a7c15u); }
  // Uniform in [low, high]; the bias of the modulo does not matter here.
  int32_t draw(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int32_t n) { return bits() % static_cast<uint64_t>(n) == 0; }

 private:
  uint64_t state_;
};

}  // namespace headway::sim
