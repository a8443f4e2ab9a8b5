// Further products of a warpgroup (wgmma.cuh has the layouts): 64 or 80 columns, both operands from shared memory,
// their rows either way.
#pragma once

#include "cuda/common/wgmma.cuh"

namespace headway::cuda::wgmma {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The descriptor of an address that all lanes agree on, said so that the compiler knows: it then steps from operand to
// operand in uniform registers, which is where products take descriptors from.
__device__ __forceinline__ uint64_t describe_uniform(uint32_t address) {
  return describe(__shfl_sync(0xffffffffu, address, 0));
}

#define HEADWAY_TILES_2(d, i)                                                                                          \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i + 1][0]), "+f"(d[i + 1][1]), "+f"(d[i + 1][2]), \
      "+f"(d[i + 1][3])
#define HEADWAY_TILES_8(d) HEADWAY_TILES_2(d, 0), HEADWAY_TILES_2(d, 2), HEADWAY_TILES_2(d, 4), HEADWAY_TILES_2(d, 6)
#define HEADWAY_TILES_10(d) HEADWAY_TILES_8(d), HEADWAY_TILES_2(d, 8)
#define HEADWAY_TILE_NAMES_8                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HEADWAY_TILE_NAMES_10 HEADWAY_TILE_NAMES_8 ", %32, %33, %34, %35, %36, %37, %38, %39"

// d[64, 8 kTiles] = a b, or += where accumulates: a [64, 16] and b from shared memory, the rows of both running the
// same way. Of b's columns across the sum those beyond a panel's are in the next (describe_panels).
template <Rows kRows, int kTiles>
__device__ __forceinline__ void multiply_shared(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulates) {
  static_assert(kTiles == 8 || kTiles == 10);
  if constexpr (kTiles == 8) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" HEADWAY_TILE_NAMES_8
        "}, %32, %33, p, 1, 1, %35, %35; }\n"
        : HEADWAY_TILES_8(d)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)), "n"(static_cast<int>(kRows)));
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %42, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" HEADWAY_TILE_NAMES_10
        "}, %40, %41, p, 1, 1, %43, %43; }\n"
        : HEADWAY_TILES_10(d)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)), "n"(static_cast<int>(kRows)));
  }
}

// The same with a from registers; kRows: which way b's rows run.
template <Rows kRows, int kTiles>
__device__ __forceinline__ void multiply(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulates) {
  static_assert(kTiles == 8 || kTiles == 10);
  if constexpr (kTiles == 8) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" HEADWAY_TILE_NAMES_8
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38; }\n"
        : HEADWAY_TILES_8(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulates)),
          "n"(static_cast<int>(kRows)));
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %45, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" HEADWAY_TILE_NAMES_10
        "}, {%40, %41, %42, %43}, %44, p, 1, 1, %46; }\n"
        : HEADWAY_TILES_10(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulates)),
          "n"(static_cast<int>(kRows)));
  }
}

#undef HEADWAY_TILE_NAMES_10
#undef HEADWAY_TILE_NAMES_8
#undef HEADWAY_TILES_10
#undef HEADWAY_TILES_8
#undef HEADWAY_TILES_2

#endif

}  // namespace headway::cuda::wgmma
