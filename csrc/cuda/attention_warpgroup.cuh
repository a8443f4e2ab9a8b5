// Attention for rows of many queries on warpgroup products (sm_90a): what the warpgroups of a block share. Three
// warpgroups take 64 packed rows each and walk over the keys side by side (attention_warpgroup_rows.cuh). One warp of
// another, some tiles ahead, takes the next rows and has the copy engine fetch their keys and values
// (attention_warpgroup_copies.cuh). Keys come in tiles of 128 from multiples of 128 positions, folded in order. Shah et
// al., "FlashAttention-3", 2024.
#pragma once

#include "cuda/attention_prefill.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/tensor_map.cuh"
#include "cuda/common/wgmma_wide.cuh"

namespace headway::cuda::prefill {

inline constexpr int kGroupThreads = 128;
inline constexpr int kGroupWarps = kGroupThreads / kWarpSize;
inline constexpr int kGroupRows = 64;
inline constexpr int kKeys = 128;  // of a tile
inline constexpr int kStages = 2;

// Warpgroups that compute. None multiplies and weighs at the same time: two others do while it does not, and three of
// them leave each tile of keys more work than two that would.
inline constexpr int kRowGroups = 3;
inline constexpr int kRowWarps = kRowGroups * kGroupWarps;
inline constexpr int kRowThreads = kRowGroups * kGroupThreads;
inline constexpr int kThreads = kRowThreads + kGroupThreads;
inline constexpr int kBlockRows = kRowGroups * kGroupRows;

// Registers a thread: 65,536 in all, and the copies need few.
inline constexpr int kRowRegisters = 160;
inline constexpr int kCopyRegisters = 32;

struct WarpgroupParams {
  PrefillParams prefill;
  CUtensorMap keys;  // [num_blocks, S, Hkv, D]
  CUtensorMap values;  // the same
  int box_keys;  // copied at once; divides the cache's block size and kKeys
  unsigned* num_taken;  // blocks of packed rows beyond the grid's first ones; 0 at the start
};

// kRows rows of kDim elements as panels of 64 columns: operands of wgmma.cuh.
template <int kDim, int kRows>
struct alignas(1024) Panels {
  static constexpr int kCount = kDim / wgmma::kPanelColumns;
  static constexpr int kPanelBytes = kRows * wgmma::kPanelRowBytes;
  static constexpr int kBytes = kCount * kPanelBytes;
  unsigned char bytes[kBytes];

  // Of 8 elements from `column` on.
  __device__ static int offset(int row, int column) {
    return column / wgmma::kPanelColumns * kPanelBytes + 2 * wgmma::panel_offset(row, column % wgmma::kPanelColumns);
  }
};

// Slots that go round, filled by the copying warp or its copies and freed by the warps that compute. turn: counts all
// uses of the ring, by each role alike.
template <typename Slot>
struct Ring {
  Slot slots[kStages];
  uint64_t full[kStages];
  uint64_t free[kStages];

  __device__ __forceinline__ Slot& slot(unsigned turn) { return slots[turn % kStages]; }
  __device__ __forceinline__ Barrier full_barrier(unsigned turn) { return {shared_address(&full[turn % kStages])}; }
  __device__ __forceinline__ Barrier free_barrier(unsigned turn) { return {shared_address(&free[turn % kStages])}; }

  __device__ void init() {
    for (unsigned i = 0; i < kStages; ++i) {
      full_barrier(i).init(1);
      free_barrier(i).init(kRowWarps);
    }
  }
  __device__ __forceinline__ void wait_full(unsigned turn) { full_barrier(turn).wait(turn / kStages % 2); }
  // A phase that has not begun counts as the end of the one before: the first slots are free.
  __device__ __forceinline__ void wait_free(unsigned turn) { free_barrier(turn).wait(turn / kStages % 2 ^ 1); }
  // By one lane of each warp that computes.
  __device__ __forceinline__ void arrive_free(unsigned turn) { free_barrier(turn).arrive(); }
};

template <int kDim>
using TileRing = Ring<Panels<kDim, kKeys>>;

template <int kDim>
struct Shared {
  Panels<kDim, kGroupRows> queries[kRowGroups];
  TileRing<kDim> keys;
  TileRing<kDim> values;
  Ring<QueryBlock> blocks;  // one without packed rows ends the work
};  // then the prefix sums of the rows' blocks

__device__ __forceinline__ int num_key_tiles(const QueryBlock& block) {
  return (block.num_keys + kKeys - 1) / kKeys;
}

}  // namespace headway::cuda::prefill
