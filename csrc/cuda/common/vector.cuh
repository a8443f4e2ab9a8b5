// Loads and stores of several elements at once: 16 bytes where pointers and strides allow it, one element otherwise.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/dtype.cuh"

namespace headway::cuda {

inline constexpr int kVectorBytes = 16;

// Elements of a 16-byte access.
template <typename T>
inline constexpr int kVectorWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < kVectorBytes ? sizeof(T) * kCount : kVectorBytes) Vector {
  T values[kCount];
};

// A vector's bits in words of up to 16 bytes: what is loaded under a condition, or kept to be used later. As elements
// nvcc would load and move such a vector two bytes at a time.
template <typename T, int kCount>
using VectorBits =
    std::conditional_t<sizeof(T) * kCount == 16, uint4,
                       std::conditional_t<sizeof(T) * kCount == 8, uint2,
                                          std::conditional_t<sizeof(T) * kCount == 4, uint32_t, uint16_t>>>;

template <typename T, int kCount>
__device__ __forceinline__ Vector<T, kCount> as_vector(VectorBits<T, kCount> bits) {
  return __builtin_bit_cast(Vector<T, kCount>, bits);
}

// By 8 bytes at least: of elements that a kernel has in registers of their own nvcc otherwise makes as many stores.
template <typename T, int kCount>
__device__ __forceinline__ void store_vector(T* target, const Vector<T, kCount>& vector) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  constexpr int kWidth = static_cast<int>(sizeof(uint64_t) / sizeof(T));
  static_assert(kCount % kWidth == 0);
#pragma unroll
  for (int first = 0; first < kCount; first += kWidth) {
    uint64_t word = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const auto bits = __builtin_bit_cast(Bits, vector.values[first + i]);
      word |= static_cast<uint64_t>(bits) << (8 * sizeof(T) * i);
    }
    *reinterpret_cast<uint64_t*>(target + first) = word;
  }
}

// bf16 by pairs, a shift or a mask each: of single elements nvcc makes two instructions for every other one.
template <typename T, int kCount>
__device__ __forceinline__ void to_floats(Vector<T, kCount> vector, float (&out)[kCount]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kCount % 2 == 0) {
    const auto words = __builtin_bit_cast(Vector<uint32_t, kCount / 2>, vector);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out[i] = __uint_as_float(i % 2 == 0 ? words.values[i / 2] << 16 : words.values[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = to_float(vector.values[i]);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void load_floats(const T* source, float (&out)[kCount]) {
  to_floats(*reinterpret_cast<const Vector<T, kCount>*>(source), out);
}

template <typename T, int kCount>
__device__ __forceinline__ void store_floats(T* target, const float (&in)[kCount]) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.values[i] = from_float<T>(in[i]);
  *reinterpret_cast<Vector<T, kCount>*>(target) = vector;
}

// Four elements that nobody reads again soon.
__device__ __forceinline__ Vector<float, 4> load_streamed(const float* source) {
  const float4 four = __ldcs(reinterpret_cast<const float4*>(source));
  return {four.x, four.y, four.z, four.w};
}
__device__ __forceinline__ Vector<__half, 4> load_streamed(const __half* source) {
  const uint2 words = __ldcs(reinterpret_cast<const uint2*>(source));
  return *reinterpret_cast<const Vector<__half, 4>*>(&words);
}
__device__ __forceinline__ void store_streamed(float* target, const Vector<float, 4>& four) {
  __stcs(reinterpret_cast<float4*>(target),
         make_float4(four.values[0], four.values[1], four.values[2], four.values[3]));
}
__device__ __forceinline__ void store_streamed(__half* target, const Vector<__half, 4>& four) {
  __stcs(reinterpret_cast<uint2*>(target), *reinterpret_cast<const uint2*>(&four));
}

// 16 bytes that no one reads again. kFetchBytes: what the L2 cache fetches at a time, 128 or 256. In a chained kernel
// only of what no kernel before it writes: ptxas moves ld.global.nc ahead of griddepcontrol.wait.
template <int kFetchBytes>
__device__ __forceinline__ uint4 load_once(const void* source) {
  static_assert(kFetchBytes == 128 || kFetchBytes == 256);
  uint4 value;
  if constexpr (kFetchBytes == 256) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(source));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(source));
  }
  return value;
}

// Starts fetching a multiple of 16 bytes, 16-byte aligned, into the L2 cache; from sm_90 on, else nothing.
__device__ __forceinline__ void prefetch_bytes(const void* source, int num_bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(num_bytes) : "memory");
#endif
}

// True when a row of `columns` elements can be read in 16-byte pieces from every row of the tensor.
template <typename T>
inline bool is_vectorisable(const void* base, int64_t row_stride, int64_t columns) {
  return reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0 && row_stride % kVectorWidth<T> == 0 &&
         columns % kVectorWidth<T> == 0;
}

}  // namespace headway::cuda
