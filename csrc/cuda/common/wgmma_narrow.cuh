// Products of a warpgroup (wgmma.cuh has the layouts) with few columns: 8, 16, 32 or 64, operands bf16 or fp16.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/common/wgmma.cuh"

namespace headway::cuda::wgmma {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define HEADWAY_SUMS_OF(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define HEADWAY_SUM_NAMES_8 "%0, %1, %2, %3"
#define HEADWAY_SUM_NAMES_16 HEADWAY_SUM_NAMES_8 ", %4, %5, %6, %7"
#define HEADWAY_SUM_NAMES_32 HEADWAY_SUM_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define HEADWAY_SUM_NAMES_64 \
  HEADWAY_SUM_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// A, B, P: names of the operands behind the sums.
#define HEADWAY_PRODUCT(COLUMNS, TYPE, A, B, P, ...)                                                                  \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " P                                                                    \
               ", 0;\n"                                                                                               \
               "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" HEADWAY_SUM_NAMES_##COLUMNS \
               "}, " A ", " B ", p, 1, 1, 0, 0; }\n"                                                                  \
               : __VA_ARGS__                                                                                          \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)))

template <bool kIsHalf>
__device__ __forceinline__ void multiply_narrow(float (&d)[1][4], uint64_t a, uint64_t b, bool accumulates) {
  if constexpr (kIsHalf) {
    HEADWAY_PRODUCT(8, "f16", "%4", "%5", "%6", HEADWAY_SUMS_OF(d, 0));
  } else {
    HEADWAY_PRODUCT(8, "bf16", "%4", "%5", "%6", HEADWAY_SUMS_OF(d, 0));
  }
}

template <bool kIsHalf>
__device__ __forceinline__ void multiply_narrow(float (&d)[2][4], uint64_t a, uint64_t b, bool accumulates) {
  if constexpr (kIsHalf) {
    HEADWAY_PRODUCT(16, "f16", "%8", "%9", "%10", HEADWAY_SUMS_OF(d, 0), HEADWAY_SUMS_OF(d, 1));
  } else {
    HEADWAY_PRODUCT(16, "bf16", "%8", "%9", "%10", HEADWAY_SUMS_OF(d, 0), HEADWAY_SUMS_OF(d, 1));
  }
}

#define HEADWAY_SUMS_OF_4(d, i) \
  HEADWAY_SUMS_OF(d, i), HEADWAY_SUMS_OF(d, i + 1), HEADWAY_SUMS_OF(d, i + 2), HEADWAY_SUMS_OF(d, i + 3)

template <bool kIsHalf>
__device__ __forceinline__ void multiply_narrow(float (&d)[4][4], uint64_t a, uint64_t b, bool accumulates) {
  if constexpr (kIsHalf) {
    HEADWAY_PRODUCT(32, "f16", "%16", "%17", "%18", HEADWAY_SUMS_OF_4(d, 0));
  } else {
    HEADWAY_PRODUCT(32, "bf16", "%16", "%17", "%18", HEADWAY_SUMS_OF_4(d, 0));
  }
}

template <bool kIsHalf>
__device__ __forceinline__ void multiply_narrow(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulates) {
  if constexpr (kIsHalf) {
    HEADWAY_PRODUCT(64, "f16", "%32", "%33", "%34", HEADWAY_SUMS_OF_4(d, 0), HEADWAY_SUMS_OF_4(d, 4));
  } else {
    HEADWAY_PRODUCT(64, "bf16", "%32", "%33", "%34", HEADWAY_SUMS_OF_4(d, 0), HEADWAY_SUMS_OF_4(d, 4));
  }
}

// d[64, 8 kTiles] = a b, or += where accumulates: a [64, 16] and b [8 kTiles, 16] from shared memory, rows along the
// sum. kTiles: 1, 2, 4 or 8. An element's sum does not depend on kTiles.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_shared_narrow(float (&d)[kTiles][4], uint64_t a, uint64_t b,
                                                       bool accumulates) {
  multiply_narrow<std::is_same_v<T, __half>>(d, a, b, accumulates);
}

#undef HEADWAY_PRODUCT
#undef HEADWAY_SUMS_OF
#undef HEADWAY_SUMS_OF_4
#undef HEADWAY_SUM_NAMES_8
#undef HEADWAY_SUM_NAMES_16
#undef HEADWAY_SUM_NAMES_32
#undef HEADWAY_SUM_NAMES_64

#endif

}  // namespace headway::cuda::wgmma
