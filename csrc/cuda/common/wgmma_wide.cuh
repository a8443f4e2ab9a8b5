// Further products of a warpgroup (wgmma.cuh has the layouts): 64 or 128 columns, operands bf16 or fp16.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/common/wgmma.cuh"

namespace headway::cuda::wgmma {

// Descriptor of an operand whose rows run across the sum and are wider than a panel: panels panel_bytes apart.
__device__ __forceinline__ uint64_t describe_panels(uint32_t address, int panel_bytes,
                                                    int group_bytes = 8 * kPanelRowBytes) {
  constexpr uint64_t kFieldMask = uint64_t{0x3fff} << 16;
  return (describe(address, group_bytes) & ~kFieldMask) | static_cast<uint64_t>(panel_bytes >> 4) << 16;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The same of an address that all lanes agree on: see describe_uniform (wgmma_tiles.cuh).
__device__ __forceinline__ uint64_t describe_uniform_panels(uint32_t address, int panel_bytes) {
  return describe_panels(__shfl_sync(0xffffffffu, address, 0), panel_bytes);
}

// A warpgroup's registers a thread, from here on: the kernel's launch bounds set what all begin with.
template <int kCount>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

#define HEADWAY_SUMS_OF(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define HEADWAY_SUMS_OF_8(d, i)                                                                           \
  HEADWAY_SUMS_OF(d, i), HEADWAY_SUMS_OF(d, i + 1), HEADWAY_SUMS_OF(d, i + 2), HEADWAY_SUMS_OF(d, i + 3), \
      HEADWAY_SUMS_OF(d, i + 4), HEADWAY_SUMS_OF(d, i + 5), HEADWAY_SUMS_OF(d, i + 6), HEADWAY_SUMS_OF(d, i + 7)
#define HEADWAY_SUM_NAMES_64                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HEADWAY_SUM_NAMES_128                                                          \
  HEADWAY_SUM_NAMES_64                                                                 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d[64, the tiles from kFirst to kFirst + 7 of its columns] += a b: a [64, 16] and b [64, 16] from shared memory, rows
// along the sum.
template <typename T, int kFirst, int kTiles>
__device__ __forceinline__ void add_shared_64(float (&d)[kTiles][4], uint64_t a, uint64_t b) {
  static_assert(kFirst + 8 <= kTiles);
#define HEADWAY_PRODUCT(TYPE)                                                                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" HEADWAY_SUM_NAMES_64 \
               "}, %32, %33, 1, 1, 1, 0, 0;\n"                                                       \
               : HEADWAY_SUMS_OF_8(d, kFirst)                                                        \
               : "l"(a), "l"(b))
  if constexpr (std::is_same_v<T, __half>) {
    HEADWAY_PRODUCT("f16");
  } else {
    HEADWAY_PRODUCT("bf16");
  }
#undef HEADWAY_PRODUCT
}

// d[64, 128] = a b, or += where accumulates: a [64, 16] and b [128, 16] from shared memory, rows along the sum.
template <typename T>
__device__ __forceinline__ void multiply_shared_128(float (&d)[16][4], uint64_t a, uint64_t b, bool accumulates) {
#define HEADWAY_PRODUCT(TYPE)                                                                 \
  asm volatile(                                                                               \
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"                                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" HEADWAY_SUM_NAMES_128 \
      "}, %64, %65, p, 1, 1, 0, 0; }\n"                                                       \
      : HEADWAY_SUMS_OF_8(d, 0), HEADWAY_SUMS_OF_8(d, 8)                                      \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)))
  if constexpr (std::is_same_v<T, __half>) {
    HEADWAY_PRODUCT("f16");
  } else {
    HEADWAY_PRODUCT("bf16");
  }
#undef HEADWAY_PRODUCT
}

// d[64, 8 kTiles] = a b, or +=: a [64, 16] from registers, b's rows across the sum. kTiles: 8 or 16.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_across(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b,
                                                bool accumulates) {
#define HEADWAY_PRODUCT_64(TYPE)                                                            \
  asm volatile(                                                                             \
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"                                            \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" HEADWAY_SUM_NAMES_64 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }\n"                                       \
      : HEADWAY_SUMS_OF_8(d, 0)                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulates)))
#define HEADWAY_PRODUCT_128(TYPE)                                                             \
  asm volatile(                                                                               \
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"                                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" HEADWAY_SUM_NAMES_128 \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }\n"                                         \
      : HEADWAY_SUMS_OF_8(d, 0), HEADWAY_SUMS_OF_8(d, 8)                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulates)))
  static_assert(kTiles == 8 || kTiles == 16);
  if constexpr (kTiles == 8 && std::is_same_v<T, __half>) {
    HEADWAY_PRODUCT_64("f16");
  } else if constexpr (kTiles == 8) {
    HEADWAY_PRODUCT_64("bf16");
  } else if constexpr (std::is_same_v<T, __half>) {
    HEADWAY_PRODUCT_128("f16");
  } else {
    HEADWAY_PRODUCT_128("bf16");
  }
#undef HEADWAY_PRODUCT_64
#undef HEADWAY_PRODUCT_128
}

#undef HEADWAY_SUMS_OF
#undef HEADWAY_SUMS_OF_8
#undef HEADWAY_SUM_NAMES_64
#undef HEADWAY_SUM_NAMES_128

#endif

}  // namespace headway::cuda::wgmma
