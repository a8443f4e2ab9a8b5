// The chunked scan on warpgroup products (sm_90a): what the warpgroups of a block share. The math is ssm_chunk.cuh's.
//
// A block takes one row and kP channels of one head. Its four warpgroups hand a chunk on: one fetches it, turns dt into
// decays and weighs x (ssm_wide_copies.cuh). One carries the state, transposed, [N, kP] in fp32 registers, as the
// accumulator of the product that adds a chunk, and leaves it rounded for the outputs (ssm_wide_states.cuh). Two,
// in turn, make a chunk's outputs (ssm_wide_outputs.cuh). Only the state's steps wait for one another.
#pragma once

#include "cuda/common/mbarrier.cuh"
#include "cuda/common/wgmma_tiles.cuh"
#include "cuda/common/wgmma_wide.cuh"
#include "cuda/ssm_chunk_decays.cuh"
#include "cuda/ssm_chunk_maps.cuh"
#include "cuda/ssm_scan_plan.cuh"

namespace headway::cuda::wide {

using chunk::Bf16;
using chunk::Chunk;
using chunk::Decays;
using chunk::kTokens;
using chunk::Maps;
using wgmma::kPanelColumns;

inline constexpr int kGroupWarps = 4;
inline constexpr int kGroupThreads = kGroupWarps * kWarpSize;
inline constexpr int kOutputGroups = 2;
inline constexpr int kThreads = (2 + kOutputGroups) * kGroupThreads;

// Registers a thread, of 128 that all begin with and the state's keep.
inline constexpr int kStateRegisters = 128;
inline constexpr int kOutputRegisters = 144;
inline constexpr int kCopyRegisters = 96;

inline constexpr int kBlock = 16;  // tokens, channels or state columns that one product sums over
inline constexpr int kNumBlocks = kTokens / kBlock;

// Rows of 64 elements as an operand: see wgmma.cuh.
template <int kRows>
struct alignas(1024) Panel {
  Bf16 values[kRows * kPanelColumns];
};
static_assert(kTokens == 64 && kTokens == kPanelColumns);

// Channels of the last panel of a tile of kP.
template <int kP>
inline constexpr int kLastColumns = kP % kPanelColumns == 0 ? kPanelColumns : kP % kPanelColumns;
template <int kP>
inline constexpr int kPanels = (kP + kPanelColumns - 1) / kPanelColumns;

// What is fetched of a chunk, its tokens as rows, and its decays. Outputs leave through the place of C.
template <int kN, int kP>
struct Stage {
  Panel<kTokens> B[kPanels<kN>];
  Panel<kTokens> C[kPanels<kN>];
  Panel<kTokens> x[kPanels<kP>];
  Decays decays;
};

// A ring of kDepth places; use: counts all uses of the ring, by each role alike.
template <int kDepth>
struct Turns {
  uint64_t full[kDepth];
  uint64_t free[kDepth];

  __device__ __forceinline__ Barrier full_barrier(unsigned use) { return {shared_address(&full[use % kDepth])}; }
  __device__ __forceinline__ Barrier free_barrier(unsigned use) { return {shared_address(&free[use % kDepth])}; }
  __device__ __forceinline__ void init(int full_arrivals, int free_arrivals) {
    for (unsigned i = 0; i < kDepth; ++i) {
      full_barrier(i).init(full_arrivals);
      free_barrier(i).init(free_arrivals);
    }
  }
  __device__ __forceinline__ void wait_full(unsigned use) { full_barrier(use).wait(use / kDepth % 2); }
  // A phase that has not begun counts as the end of the one before: the first places are free.
  __device__ __forceinline__ void wait_free(unsigned use) { free_barrier(use).wait(use / kDepth % 2 ^ 1); }
};

template <int kN, int kP>
struct Shared {
  static constexpr int kStages = kP > kPanelColumns ? 3 : 4;
  Stage<kN, kP> stages[kStages];
  Panel<kTokens> weighed[2][kPanels<kP>];  // e^(cs_L - cs_j) dt_j x_j
  Panel<kP> states[kOutputGroups][kPanels<kN>];  // before a chunk, for the group that makes its outputs
  Turns<kStages> chunks;  // full: fetched and weighed; free: no thread of the state or the outputs needs it
  Turns<kStages> fetched;  // and its decays made; freed with the chunk
  Turns<2> weights;  // freed by the state; full with the chunk
  Turns<kOutputGroups> rounded;  // of states

  __device__ __forceinline__ Stage<kN, kP>& stage(unsigned turn) { return stages[turn % kStages]; }

  // One thread, before any other use.
  __device__ __forceinline__ void init_barriers() {
    chunks.init(kGroupThreads, 2 * kGroupThreads);
    fetched.init(1 + kWarpSize, 1);  // the copies and the lanes that made the decays
    weights.init(1, kGroupWarps);
    rounded.init(kGroupThreads, kGroupWarps);
    Barrier::publish_inits();
  }
};

// What a block works on.
struct Work {
  const SsmScanParams& params;
  const Maps& maps;
  const chunk::ScanItem& item;
  int head;
  int first_channel;  // of the tile, among all heads' channels
  __device__ __forceinline__ int group() const { return head / (params.num_heads / params.num_groups); }
  // The slots' states, of which the first is null where nothing came before.
  __device__ __forceinline__ const float* source() const {
    return item.tokens.start > 0 ? slot(params.read_slots[item.row]) : nullptr;
  }
  __device__ __forceinline__ float* target() const { return slot(params.write_slots[item.row]); }

 private:
  __device__ __forceinline__ float* slot(int64_t idx) const {
    return static_cast<float*>(params.state) + idx * params.state_stride;
  }
};

// Where the block is in the rings.
struct Place {
  unsigned turn = 0;  // chunks
  unsigned output = 0;  // chunks with outputs
};

__device__ __forceinline__ int group_thread() {
  return static_cast<int>(threadIdx.x) % kGroupThreads;
}
__device__ __forceinline__ int group_warp() {
  return group_thread() / kWarpSize;
}
__device__ __forceinline__ bool is_first_lane() {
  return threadIdx.x % kWarpSize == 0;
}

// Meets the threads of the copies' warpgroup.
__device__ __forceinline__ void meet_copies() {
  asm volatile("bar.sync 1, %0;" ::"n"(kGroupThreads) : "memory");
}

// Of an operand in panels of kRows rows, the descriptor's distance to the 16 columns from `column` on, and to the 16
// rows from `row` on.
template <int kRows>
__device__ __forceinline__ constexpr uint64_t columns_on(int column) {
  return (column / kPanelColumns * sizeof(Panel<kRows>) +
          column % kPanelColumns / kBlock * wgmma::kStepBytes<wgmma::Rows::kAlongSum>) >>
         4;
}
__device__ __forceinline__ constexpr uint64_t rows_on(int row) {
  return static_cast<uint64_t>(row * wgmma::kPanelRowBytes) >> 4;
}

}  // namespace headway::cuda::wide
