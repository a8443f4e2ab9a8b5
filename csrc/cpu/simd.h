// One vector of floats as wide as the level it is compiled for, and the few operations the kernels need.
//
// Written with the vector extensions of GCC and Clang. Products and sums are fused only where `fma` says so (the build
// turns contraction off), so that every copy of an expression rounds alike: rows are then bit-equal whichever loop,
// tail or tile computed them.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace headway::cpu::HEADWAY_SIMD {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

using F32 __attribute__((vector_size(kLanes * 4))) = float;
using I32 __attribute__((vector_size(kLanes * 4))) = int32_t;
using U32 __attribute__((vector_size(kLanes * 4))) = uint32_t;
using U16 __attribute__((vector_size(kLanes * 2))) = uint16_t;

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

inline F32 broadcast(float value) {
  return value - F32{};  // the compiler folds x - 0, not x + 0, which is another number for -0
}

inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return bits_as<F32>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
#elif defined(__AVX2__)
  return bits_as<F32>(_mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
#elif defined(__aarch64__)
  return bits_as<F32>(vfmaq_f32(bits_as<float32x4_t>(c), bits_as<float32x4_t>(a), bits_as<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

inline F32 max(F32 a, F32 b) {
  return a > b ? a : b;
}
inline F32 min(F32 a, F32 b) {
  return a < b ? a : b;
}

// --- memory -----------------------------------------------------------------------------------------------------

inline float to_float(float value) {
  return value;
}
inline float to_float(BFloat16 value) {
  return bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}

inline F32 load(const float* source) {
  F32 value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

inline F32 load(const BFloat16* source) {
  U16 narrow;
  std::memcpy(&narrow, source, sizeof(narrow));
  return bits_as<F32>(__builtin_convertvector(narrow, U32) << 16);
}

inline void store(float* target, F32 value) {
  std::memcpy(target, &value, sizeof(value));
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(BFloat16* target, F32 value) {
  const U32 bits = bits_as<U32>(value);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 quiet = (bits >> 16) | 0x40u;
  const U16 narrow = __builtin_convertvector(value == value ? rounded : quiet, U16);
  std::memcpy(target, &narrow, sizeof(narrow));
}

// The first count elements, 0 <= count <= kLanes; lanes beyond are zero, memory beyond is not touched.
template <class T>
inline F32 load_part(const T* source, int64_t count) {
  if (count >= kLanes) return load(source);
  T padded[kLanes] = {};
  std::memcpy(padded, source, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_part(T* target, F32 value, int64_t count) {
  if (count >= kLanes) return store(target, value);
  T padded[kLanes];
  store(padded, value);
  std::memcpy(target, padded, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
inline void store_scalar(T* target, float value) {
  store_part(target, broadcast(value), 1);
}

// --- reductions -------------------------------------------------------------------------------------------------

template <int kWidth, bool kUpper, int... kLane>
inline F32 gather_halves(F32 a, F32 b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kWidth * (kLane / kWidth) + kLane % kWidth + (kUpper ? kWidth : 0))...);
}

// Adds the upper kWidth lanes of every group of 2 * kWidth to the lower ones; a's results come first, then b's.
template <int kWidth>
inline F32 fold(F32 a, F32 b) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  return gather_halves<kWidth, false>(a, b, Lanes{}) + gather_halves<kWidth, true>(a, b, Lanes{});
}

// Sums of kLanes vectors, lane i that of vectors[i]. The same tree of additions as reduce_add.
template <int kCount = kLanes>
inline F32 reduce_add_each(const F32* vectors) {
  if constexpr (kCount == 1) {
    return vectors[0];
  } else {
    constexpr int kHalf = kCount / 2;
    return fold<kLanes / kCount>(reduce_add_each<kHalf>(vectors), reduce_add_each<kHalf>(vectors + kHalf));
  }
}

template <int kWidth = kLanes / 2>
inline float reduce_add(F32 value) {
  const F32 folded = fold<kWidth>(value, value);
  if constexpr (kWidth == 1) {
    return folded[0];
  } else {
    return reduce_add<kWidth / 2>(folded);
  }
}

inline float reduce_max(F32 value) {
  float result = value[0];
  for (int lane = 1; lane < kLanes; ++lane) result = value[lane] > result ? value[lane] : result;
  return result;
}

}  // namespace headway::cpu::HEADWAY_SIMD
