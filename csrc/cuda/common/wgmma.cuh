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
// rows are group_bytes apart, in a panel of its own 1,024. One instruction stays within one panel's columns, so the
// distance of panels is not used.
__device__ __forceinline__ uint64_t describe(uint32_t address, int group_bytes = 8 * kPanelRowBytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  const uint64_t row_group = static_cast<uint64_t>(group_bytes >> 4) << 32;
  return kSwizzle128 | row_group | kUnused | ((address & 0x3ffffu) >> 4);
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

// Makes what this thread wrote to shared memory visible to products that read it there; before a barrier.
__device__ __forceinline__ void publish_operands() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

}  // namespace headway::cuda::wgmma
