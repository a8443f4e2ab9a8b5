// The chunked scan on warpgroup products (sm_90a): what the warpgroups of a block share. The math is ssm_chunk.cuh's.
//
// The channels of a group of heads, one after the other, are cut into tiles of 64. A block takes one row and one or two
// neighbouring tiles. Each tile has a warpgroup (ssm_warpgroup_tile.cuh) that keeps the tile's state [64, N] in fp32
// registers, where it is the accumulator of one product and, rounded, the operand of the next. One more warpgroup
// (ssm_warpgroup_scores.cuh) fetches the chunks, makes C . B^T once for all heads of the block, and from it each head's
// weights. A tile may straddle two heads where 64 does not divide the head dim: rows of a product never mix.
#pragma once

#include "cuda/common/mbarrier.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/ssm_chunk_decays.cuh"

namespace headway::cuda::warpgroup {

using chunk::Bf16;
using chunk::Chunk;
using chunk::Decays;
using chunk::kTokens;

inline constexpr int kTileChannels = 64;
inline constexpr int kGroupWarps = 4;
inline constexpr int kGroupThreads = kGroupWarps * kWarpSize;
inline constexpr int kBlock = 16;  // tokens or state columns that one product sums over
inline constexpr int kNumBlocks = kTokens / kBlock;

// Tile warpgroups come first, the scores' warpgroup last.
template <int kTiles>
inline constexpr int kThreads = (kTiles + 1) * kGroupThreads;
// Heads of at least 64 channels that a block may touch.
template <int kTiles>
inline constexpr int kMaxHeads = kTiles + 1;

// One operand of 64 rows of 64: see wgmma.cuh.
struct alignas(1024) Panel {
  Bf16 values[kTokens * wgmma::kPanelColumns];
};
static_assert(kTokens == 64 && kTileChannels == wgmma::kPanelColumns);

// What is fetched of a chunk. B and C: panels of 64 state columns; x: one panel a tile, which also carries the tile's
// outputs on their way to memory.
template <int kN, int kTiles>
struct Stage {
  Panel B[kN / wgmma::kPanelColumns];
  Panel C[kN / wgmma::kPanelColumns];
  Panel x[kTiles];
};

// Chunks alternate between the two sets of weights and decays and go round the stages. Whoever works on chunk i waits
// for ready[i % 2]; the scores' warpgroup makes weights for i + 2 once all have left i.
template <int kN, int kTiles>
struct Shared {
  static constexpr int kStages = kTiles == 1 ? 4 : 3;
  static constexpr int kAhead = kStages - 2;  // chunks whose copies are under way while weights are made
  Stage<kN, kTiles> stages[kStages];
  Panel weights[2][kMaxHeads<kTiles>];
  alignas(16) Decays decays[2][kMaxHeads<kTiles>];
  alignas(8) uint64_t ready[2];
  alignas(8) uint64_t released[2];

  __device__ __forceinline__ Barrier ready_barrier(unsigned turn) const { return {shared_address(&ready[turn % 2])}; }
  __device__ __forceinline__ Barrier released_barrier(unsigned turn) const {
    return {shared_address(&released[turn % 2])};
  }
};

// What a block works on: one row's tokens are the same for all. Channels count within the group, heads within the
// model.
struct Work {
  const SsmScanParams& params;
  int group;
  int first_channel;
  int num_tiles;

  __device__ __forceinline__ int heads_per_group() const { return params.num_heads / params.num_groups; }
  __device__ __forceinline__ int first_head() const {
    return group * heads_per_group() + first_channel / params.head_dim;
  }
  __device__ __forceinline__ int num_heads() const {
    return (first_channel + num_tiles * kTileChannels - 1) / params.head_dim - first_channel / params.head_dim + 1;
  }
  // Of a channel of the group, among all heads' channels.
  __device__ __forceinline__ int flat_channel(int channel) const {
    return group * heads_per_group() * params.head_dim + channel;
  }
  // Which of the block's heads a channel of the group belongs to.
  __device__ __forceinline__ int local_head(int channel) const {
    return channel / params.head_dim - first_channel / params.head_dim;
  }
};

// Meets the threads of one warpgroup; ids 1 to kTiles + 1 are theirs.
__device__ __forceinline__ void meet_group(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}

}  // namespace headway::cuda::warpgroup
