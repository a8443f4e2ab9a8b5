// The chunked scan on warpgroup products (sm_90a): what the warpgroups of a block share. The math is ssm_chunk.cuh's.
//
// The channels of a group of heads, one after the other, are cut into tiles of 64. A block takes one row and one tile,
// and has three roles. A warpgroup keeps the tile's state [64, N] in fp32 registers, where it is the accumulator of one
// product and, rounded, the operand of the next (ssm_warpgroup_tile.cuh). A second one, some chunks ahead, fetches the
// data, turns dt into decays and weighs x (ssm_warpgroup_copies.cuh). A third makes the weights in between
// (ssm_warpgroup_scores.cuh). A tile may straddle two heads where 64 does not divide the head dim: rows of a product
// never mix. Where there are many tiles, blocks of two warpgroups share a multiprocessor instead (ssm_paired.cuh).
#pragma once

#include "cuda/common/mbarrier.cuh"
#include "cuda/common/wgmma_tiles.cuh"
#include "cuda/ssm_chunk_decays.cuh"
#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_scan_plan.cuh"

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

// The tile's warpgroup comes first, then the scores', then the copies'.
inline constexpr int kThreads = 3 * kGroupThreads;

// Registers a thread, of 168 that all begin with: a state, its outputs and their operands want more than the rest.
inline constexpr int kTileRegisters = 216;
inline constexpr int kOtherRegisters = 144;
inline constexpr int kBlockRegisters = (kTileRegisters + 2 * kOtherRegisters) / 3;

inline constexpr int kMaxHeads = 2;  // that a tile may touch, of at least 64 channels each

// One operand of 64 rows of 64: see wgmma.cuh.
struct alignas(1024) Panel {
  Bf16 values[kTokens * wgmma::kPanelColumns];
};
static_assert(kTokens == 64 && kTileChannels == wgmma::kPanelColumns);

// What is fetched of a chunk. B and C: panels of 64 state columns; x also carries the outputs on their way to memory.
template <int kN>
struct Stage {
  Panel B[kN / wgmma::kPanelColumns];
  Panel C[kN / wgmma::kPanelColumns];
  Panel x;
};

// e^(cs_L - cs_j) dt_j x_j, as the tile's warps take it for an operand: by warp, block of tokens and lane.
struct alignas(16) WeighedTile {
  uint4 words[kGroupWarps][kNumBlocks][kWarpSize];
};

// A chunk goes through three hands: fetched when its data is in its stage, ready when its weights are made, free when
// the tile has left it. Stages and decays go round; weights alternate between two sets. turn: the chunk's place among
// all that the block works on, counted by each role alike. kHeads: that a tile may touch.
template <int kStateSize, int kHeads, int kStageTurns, int kDecayTurns, int kFetchArrivals, int kReadyArrivals>
struct Handover {
  static constexpr int kN = kStateSize;
  static constexpr int kStages = kStageTurns;
  Stage<kN> stages[kStages];
  Panel weights[2][kHeads];
  Decays decay_ring[kDecayTurns][kHeads];
  alignas(8) uint64_t fetched[kStages];
  alignas(8) uint64_t ready[2];
  alignas(8) uint64_t free[kStages];

  __device__ __forceinline__ Stage<kN>& stage(unsigned turn) { return stages[turn % kStages]; }
  __device__ __forceinline__ Decays& decays(unsigned turn, int head) { return decay_ring[turn % kDecayTurns][head]; }
  __device__ __forceinline__ Barrier fetched_barrier(unsigned turn) {
    return Barrier{shared_address(&fetched[turn % kStages])};
  }

  // One thread, before any other use.
  __device__ __forceinline__ void init_barriers() {
    for (int i = 0; i < kStages; ++i) {
      Barrier{shared_address(&fetched[i])}.init(kFetchArrivals);
      Barrier{shared_address(&free[i])}.init(kGroupThreads);
    }
    for (auto& barrier : ready) Barrier{shared_address(&barrier)}.init(kReadyArrivals);
    Barrier::publish_inits();
  }

  __device__ __forceinline__ void wait_fetched(unsigned turn) { fetched_barrier(turn).wait(turn / kStages % 2); }
  __device__ __forceinline__ void arrive_ready(unsigned turn) { Barrier{shared_address(&ready[turn % 2])}.arrive(); }
  __device__ __forceinline__ void wait_ready(unsigned turn) {
    Barrier{shared_address(&ready[turn % 2])}.wait(turn / 2 % 2);
  }
  // By each thread of the tile for what it has read.
  __device__ __forceinline__ void arrive_free(unsigned turn) {
    Barrier{shared_address(&free[turn % kStages])}.arrive();
  }
  // That the tile has left the chunk `distance` turns ago, if there was one.
  __device__ __forceinline__ void wait_free(unsigned turn, unsigned distance) {
    if (turn < distance) return;
    Barrier{shared_address(&free[(turn - distance) % kStages])}.wait((turn - distance) / kStages % 2);
  }
};

// Fetched by each thread's copies, and its decays; ready by the scores' and the copies' threads, of which the latter
// weigh x.
template <int kN>
struct Shared : Handover<kN, kMaxHeads, /*kStageTurns=*/4, /*kDecayTurns=*/8, 2 * kGroupThreads, 2 * kGroupThreads> {
  static constexpr bool kIsWeighed = true;
  WeighedTile weighed[2];
};

// What a block works on. Channels count within the group, heads within the model.
struct Work {
  const SsmScanParams& params;
  chunk::ScanItem item;
  int group;
  int first_channel;

  __device__ __forceinline__ int heads_per_group() const { return params.num_heads / params.num_groups; }
  __device__ __forceinline__ int first_head() const {
    return group * heads_per_group() + first_channel / params.head_dim;
  }
  __device__ __forceinline__ int num_heads() const {
    return (first_channel + kTileChannels - 1) / params.head_dim - first_channel / params.head_dim + 1;
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

// threadIdx.x, read anew: what follows from it is made again where the compiler would else keep it over a loop, in
// registers that it does not have.
__device__ __forceinline__ int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Meets the threads of the tile's warpgroup.
__device__ __forceinline__ void meet_tile() {
  asm volatile("bar.sync 1, %0;" ::"n"(kGroupThreads) : "memory");
}

}  // namespace headway::cuda::warpgroup
