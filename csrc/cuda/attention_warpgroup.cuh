// Attention for rows of many queries on warpgroup products (sm_90a): what the warpgroups of a block share. Three
// warpgroups take 64 packed rows each and walk over the keys side by side (attention_warpgroup_rows.cuh). One warp of
// another, some tiles ahead, takes the next rows and has the copy engine fetch their keys and values
// (attention_warpgroup_copies.cuh). Keys come in tiles of 128 from multiples of 128 positions, folded in order. Shah et
// al., "FlashAttention-3", 2024.
#pragma once

#include "cuda/attention_panels.cuh"
#include "cuda/attention_prefill.cuh"

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

template <int kDim>
using Tile = KeyTile<kDim, kKeys>;

template <int kDim>
using TileRing = Ring<Tile<kDim>, kStages, kRowWarps>;

template <int kDim>
struct Shared {
  Panels<kDim, kGroupRows> queries[kRowGroups];
  TileRing<kDim> keys;
  TileRing<kDim> values;
  Ring<QueryBlock, kStages, kRowThreads> blocks;  // one without packed rows ends the work
};  // then the prefix sums of the rows' blocks

__device__ __forceinline__ int num_key_tiles(const QueryBlock& block) {
  return (block.num_keys + kKeys - 1) / kKeys;
}

}  // namespace headway::cuda::prefill
