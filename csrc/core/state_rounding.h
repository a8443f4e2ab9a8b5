// Rounds fp32 states to fp16 at random, up as often as a value is near to the upper neighbour, so that the mean is
// kept: a state that decays slowly takes inputs in steps below half a unit of fp16, which rounding to nearest would
// lose one by one. Host and device code alike.
//
// The random bits are a hash of the position (tokens that the state has seen) and the element's place in the slot's
// [H, P, N] alone: a row gets the same ones beside any other rows, and again after it was set back.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/state_base.h"

namespace headway {

namespace rounding {

inline constexpr uint32_t kDroppedBits = 13;           // of fp32's 23 bits of mantissa
inline constexpr uint32_t kMinNormal = 113u << 23;     // bits of 2^-14 in fp32; below, fp16's steps are 2^-24
inline constexpr uint32_t kExponentShift = 112u << 23; // between the exponents' biases
inline constexpr uint32_t kInfinity = 255u << 23;
inline constexpr uint16_t kMaxHalf = 0x7bff;  // 65504: what is larger stays finite
inline constexpr uint16_t kNaNHalf = 0x7e00;

HEADWAY_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
HEADWAY_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Every bit of the result depends on every bit of x (C. Wellons, "Prospecting for hash functions", 2018: lowbias32).
HEADWAY_HOST_DEVICE constexpr uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

}  // namespace rounding

// The random numbers of one position.
struct StateRounding {
  uint32_t key;

  HEADWAY_HOST_DEVICE explicit constexpr StateRounding(int32_t position)
      : key(rounding::mix(static_cast<uint32_t>(position) + 0x9e3779b9u)) {}

  // Bits 0-12 are for element 2 pair, bits 16-28 for the next.
  HEADWAY_HOST_DEVICE constexpr uint32_t pair_bits(uint32_t pair) const { return rounding::mix(pair + key); }

  HEADWAY_HOST_DEVICE constexpr uint32_t bits(uint32_t element) const {
    const uint32_t pair = pair_bits(element / 2);
    return element % 2 == 0 ? pair : pair >> 16;
  }
};

// fp16 of `value`; of random_bits the lowest 13 count. fp32 values are truncated after a uniform number below one step
// was added to their magnitude.
HEADWAY_HOST_DEVICE inline uint16_t round_state(float value, uint32_t random_bits) {
  using namespace rounding;
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 31 << 15;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t random = random_bits & ((1u << kDroppedBits) - 1);
  if (magnitude > kInfinity) return kNaNHalf;
  uint32_t half = 0;
  if (magnitude < kMinNormal) {  // beside 2^-14 the steps are those of fp16's smallest numbers
    half = (bits_of(float_of(magnitude) + float_of(kMinNormal)) + random - kMinNormal) >> kDroppedBits;
  } else {
    half = (magnitude + random - kExponentShift) >> kDroppedBits;
    if (half > kMaxHalf) half = kMaxHalf;
  }
  return static_cast<uint16_t>(sign | half);
}

// The value of an fp16 state, exactly. Infinity, which round_state does not make, reads as NaN.
HEADWAY_HOST_DEVICE inline float widen_state(uint16_t half) {
  using namespace rounding;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude > kMaxHalf) return float_of(kInfinity + 1);
  constexpr float kSmallestStep = 5.9604644775390625e-8f;  // 2^-24
  const float value = magnitude < 1u << 10 ? static_cast<float>(magnitude) * kSmallestStep
                                           : float_of((magnitude << kDroppedBits) + kExponentShift);
  return float_of(bits_of(value) | sign);
}

}  // namespace headway
