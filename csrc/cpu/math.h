// exp, log1p and what is made of them, per lane. Errors against the exact value, measured in tests/ops: exp and log1p
// below 2 ulp. Method: Cody & Waite range reduction and minimax polynomials (coefficients after Cephes' expf, logf).
#pragma once

#include "cpu/simd.h"

namespace headway::cpu::HEADWAY_SIMD {

// exp(x); 0 below -104, inf above 88.73, NaN stays NaN.
inline F32 exp(F32 x) {
  constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x < -104.0f ? broadcast(-104.0f) : x;
  x = x > 89.0f ? broadcast(89.0f) : x;
  const F32 shifted = fma(x, broadcast(1.44269504088896341f), broadcast(kRoundMagic));
  const F32 whole = shifted - kRoundMagic;
  F32 rest = fma(whole, broadcast(-0.693359375f), x);
  rest = fma(whole, broadcast(2.12194440e-4f), rest);
  F32 poly = broadcast(1.9875691500e-4f);
  poly = fma(poly, rest, broadcast(1.3981999507e-3f));
  poly = fma(poly, rest, broadcast(8.3334519073e-3f));
  poly = fma(poly, rest, broadcast(4.1665795894e-2f));
  poly = fma(poly, rest, broadcast(1.6666665459e-1f));
  poly = fma(poly, rest, broadcast(5.0000001201e-1f));
  poly = fma(poly, rest * rest, rest) + 1.0f;
  // 2^whole in two factors, so that both ends of the range come out right.
  const I32 exponent = bits_as<I32>(shifted) - bits_as<int32_t>(kRoundMagic);
  const I32 half = exponent >> 1;
  const F32 first = bits_as<F32>((half + 127) << 23);
  const F32 second = bits_as<F32>((exponent - half + 127) << 23);
  return poly * first * second;
}

// log(x) for normal positive x.
inline F32 log_normal(F32 x) {
  // x = mantissa * 2^exponent with mantissa in [sqrt(1/2), sqrt(2))
  const I32 bits = bits_as<I32>(x);
  const I32 exponent = (bits - 0x3f3504f3) >> 23;
  const F32 rest = bits_as<F32>(bits - (exponent << 23)) - 1.0f;
  const F32 power = __builtin_convertvector(exponent, F32);
  F32 poly = broadcast(7.0376836292e-2f);
  poly = fma(poly, rest, broadcast(-1.1514610310e-1f));
  poly = fma(poly, rest, broadcast(1.1676998740e-1f));
  poly = fma(poly, rest, broadcast(-1.2420140846e-1f));
  poly = fma(poly, rest, broadcast(1.4249322787e-1f));
  poly = fma(poly, rest, broadcast(-1.6668057665e-1f));
  poly = fma(poly, rest, broadcast(2.0000714765e-1f));
  poly = fma(poly, rest, broadcast(-2.4999993993e-1f));
  poly = fma(poly, rest, broadcast(3.3333331174e-1f));
  const F32 square = rest * rest;
  F32 tail = fma(power, broadcast(-2.12194440e-4f), poly * rest * square);
  tail = fma(square, broadcast(-0.5f), tail);
  return fma(power, broadcast(0.693359375f), rest + tail);
}

// log(1 + x) for x >= 0: the logarithm of the rounded sum, and the sum's rounding error to first order.
inline F32 log1p_positive(F32 x) {
  const F32 sum = x + 1.0f;
  return log_normal(sum) + (x - (sum - 1.0f)) / sum;
}

inline F32 softplus(F32 x) {
  return x > 20.0f ? x : log1p_positive(exp(min(x, broadcast(20.0f))));
}

inline F32 sigmoid(F32 x) {
  return 1.0f / (1.0f + exp(-x));
}
inline F32 silu(F32 x) {
  return x / (1.0f + exp(-x));
}

}  // namespace headway::cpu::HEADWAY_SIMD
