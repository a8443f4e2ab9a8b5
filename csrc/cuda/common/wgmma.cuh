// Matrix products of a warpgroup (four warps, the first a multiple of four) on sm_90a: wgmma. PTX ISA, "Asynchronous
// warpgroup level matrix instructions". Operands bf16, sums fp32. Results of a product stay in flight until they are
// waited for; until then nobody touches its registers.
//
// Accumulators [64, 8 tiles of 8]: warp w of the four holds rows 16 w + lane / 4 (d[tile][0], d[tile][1]) and 8 more
// (d[tile][2], d[tile][3]), columns 8 tile + 2 (lane % 4) and the next: per warp the layout of mma.m16n8k16, as is that
// of operand A in registers.
#pragma once

#include <cstdint>

namespace headway::cuda::wgmma {

// Operands in shared memory lie in panels of rows of 128 bytes (64 elements), 16-byte piece c of row r at c ^ (r % 8),
// each panel at a multiple of 1,024 bytes.
inline constexpr int kPanelColumns = 64;
inline constexpr int kPanelRowBytes = 128;

__device__ __forceinline__ int panel_offset(int row, int column) {
  return row * kPanelColumns + (((column / 8) ^ (row & 7)) * 8) + column % 8;
}

// Which way an operand's rows run: along the products' sums (k), or across them.
enum class Rows { kAlongSum = 0, kAcrossSum = 1 };

// Descriptor of an operand that starts at this shared-memory address, in a panel with the 128-byte swizzle; groups of 8
// rows are 1,024 bytes apart. One instruction stays within one panel's columns, so the distance of panels is not used.
__device__ __forceinline__ uint64_t describe(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kRowGroup = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kRowGroup | kUnused | ((address & 0x3ffffu) >> 4);
}

// 16 steps along the sum from one operand's start to the next.
template <Rows kRows>
inline constexpr int kStepBytes = kRows == Rows::kAlongSum ? 32 : 16 * kPanelRowBytes;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Before the first product, and after its registers were written by anything else.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of registers across this point.
template <int kTiles>
__device__ __forceinline__ void hold(float (&d)[kTiles][4]) {
#pragma unroll
  for (auto& tile : d) {
#pragma unroll
    for (float& value : tile) asm volatile("" : "+f"(value)::"memory");
  }
}
template <int kCount>
__device__ __forceinline__ void hold(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (auto& operand : a) {
#pragma unroll
    for (uint32_t& word : operand) asm volatile("" : "+r"(word)::"memory");
  }
}

// d[64, 64] = a b, or += where accumulates: a [64, 16] from shared memory, rows along the sum, as b's are.
__device__ __forceinline__ void multiply_shared(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulates) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }\n"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
        "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
        "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),
        "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
        "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)));
}

// d[64, the tiles from kFirst to kFirst + 7 of its columns] = a b, or +=: a [64, 16] from registers.
template <Rows kRows, int kFirst, int kTiles>
__device__ __forceinline__ void multiply(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulates) {
  static_assert(kFirst + 8 <= kTiles);
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38; }\n"
      : "+f"(d[kFirst + 0][0]), "+f"(d[kFirst + 0][1]), "+f"(d[kFirst + 0][2]), "+f"(d[kFirst + 0][3]),
        "+f"(d[kFirst + 1][0]), "+f"(d[kFirst + 1][1]), "+f"(d[kFirst + 1][2]), "+f"(d[kFirst + 1][3]),
        "+f"(d[kFirst + 2][0]), "+f"(d[kFirst + 2][1]), "+f"(d[kFirst + 2][2]), "+f"(d[kFirst + 2][3]),
        "+f"(d[kFirst + 3][0]), "+f"(d[kFirst + 3][1]), "+f"(d[kFirst + 3][2]), "+f"(d[kFirst + 3][3]),
        "+f"(d[kFirst + 4][0]), "+f"(d[kFirst + 4][1]), "+f"(d[kFirst + 4][2]), "+f"(d[kFirst + 4][3]),
        "+f"(d[kFirst + 5][0]), "+f"(d[kFirst + 5][1]), "+f"(d[kFirst + 5][2]), "+f"(d[kFirst + 5][3]),
        "+f"(d[kFirst + 6][0]), "+f"(d[kFirst + 6][1]), "+f"(d[kFirst + 6][2]), "+f"(d[kFirst + 6][3]),
        "+f"(d[kFirst + 7][0]), "+f"(d[kFirst + 7][1]), "+f"(d[kFirst + 7][2]), "+f"(d[kFirst + 7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulates)),
        "n"(static_cast<int>(kRows)));
}

// Makes what this thread wrote to shared memory visible to products that read it there; before a barrier.
__device__ __forceinline__ void publish_operands() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

}  // namespace headway::cuda::wgmma
