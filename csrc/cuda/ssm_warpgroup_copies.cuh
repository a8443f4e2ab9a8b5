// The copies' warpgroup of ssm_warpgroup.cuh: fetches the chunks' data and turns dt into decays, as many chunks ahead
// as there are stages.
#pragma once

#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_warpgroup_x.cuh"

namespace headway::cuda::warpgroup {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename Memory>
struct CopyGroup {
  static constexpr int kN = Memory::kN;
  using Buffers = Stage<kN>;
  static constexpr int kAhead = 2;  // a chunk is weighed when so many have been asked for
  static constexpr int kDecaysAhead = 2;  // but for a row's first chunks, decays are made so long before
  const Work& work;
  Memory& shared;
  int thread;
  int warp;
  int num_heads;
  int tile_head;  // of the block's, that the tile's warp of the same index works for
  chunk::HeadClock clock;
  chunk::HeadClock::RawPair dt;  // of the decays that the warp makes next

  __device__ __forceinline__ CopyGroup(const Work& block_work, Memory& memory)
      : work(block_work),
        shared(memory),
        thread(static_cast<int>(threadIdx.x) - 2 * kGroupThreads),
        warp(thread / kWarpSize),
        num_heads(block_work.num_heads()),
        tile_head(block_work.local_head(block_work.first_channel + warp * kBlock)),
        clock(block_work.params, block_work.first_head() + warp % num_heads) {}

  // kPanels panels side by side: rows of the chunk from `from` on.
  template <int kPanels, bool kIsFull>
  __device__ __forceinline__ void copy_rows(Panel* target, const Bf16* from, int64_t stride, int count) const {
    constexpr int kPieces = kPanels * 8;
    constexpr int kRows = kGroupThreads / kPieces;  // copied at once; a multiple of 8, so a thread's swizzle stays
    static_assert(kRows % 8 == 0);
    const int row = thread / kPieces;
    const int column = thread % kPieces * 8;
    Panel& panel = target[column / wgmma::kPanelColumns];
    const int offset = wgmma::panel_offset(row, column % wgmma::kPanelColumns);
    const uint32_t to = shared_address(&panel.values[offset]);
    from += row * stride + column;
#pragma unroll
    for (int i = 0; i < kTokens / kRows; ++i) {
      copy_async(to + i * kRows * wgmma::kPanelRowBytes, from, kIsFull || row + i * kRows < count);
      from += kRows * stride;
    }
  }

  // Starts the copies of a chunk.
  template <bool kIsFull>
  __device__ __forceinline__ void copy_chunk(Buffers& stage, Chunk chunk, bool has_outputs) const {
    const SsmScanParams& params = work.params;
    constexpr int kPanels = kN / wgmma::kPanelColumns;
    const auto* C = static_cast<const Bf16*>(params.C) + chunk.token * params.c_stride + work.group * kN;
    const auto* B = static_cast<const Bf16*>(params.B) + chunk.token * params.b_stride + work.group * kN;
    const auto* x =
        static_cast<const Bf16*>(params.x) + chunk.token * params.x_stride + work.flat_channel(work.first_channel);
    if (has_outputs) copy_rows<kPanels, kIsFull>(stage.C, C, params.c_stride, chunk.count);
    copy_rows<kPanels, kIsFull>(stage.B, B, params.b_stride, chunk.count);
    copy_rows<1, kIsFull>(&stage.x, x, params.x_stride, chunk.count);
  }

  // To the cache: the tile's warpgroup may still be busy with another row.
  __device__ __forceinline__ void prefetch_state() const {
    const SsmScanParams& params = work.params;
    if (work.item.tokens.start == 0) return;
    constexpr int kLine = 128 / sizeof(float);
    const float* first = static_cast<const float*>(params.state) +
                         params.read_slots[work.item.row] * params.state_stride +
                         static_cast<int64_t>(work.flat_channel(work.first_channel)) * kN;
    for (int i = thread; i < kTileChannels * kN / kLine; i += kGroupThreads) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(first + i * kLine) : "memory");
    }
  }

  // For the tile's warp of the same channels.
  __device__ __forceinline__ void weigh(unsigned turn) const {
    shared.wait_fetched(turn);
    uint32_t x[kNumBlocks][4];
    uint32_t weighed[kNumBlocks][4];
    load_x(shared.stage(turn).x, thread, x);
    weigh_x(shared.decays(turn, tile_head), thread, x, weighed);
    shared.wait_free(turn, 2);
    store_weighed(shared.weighed[turn % 2], thread, weighed);
    shared.arrive_ready(turn);
  }

  __device__ __forceinline__ void fetch(int i, unsigned turn) {
    const Chunk chunk = work.item.tokens.chunk(i);
    shared.wait_free(turn, Memory::kStages);
    const bool has_outputs = i >= work.item.first_output;
    if (chunk.count == kTokens) {
      copy_chunk<true>(shared.stage(turn), chunk, has_outputs);
    } else {
      copy_chunk<false>(shared.stage(turn), chunk, has_outputs);
    }
    shared.fetched_barrier(turn).arrive_after_copies();
  }

  // Decays of the row's i-th chunk, by the warps whose turn it is: they take turns, as those take longest. The tile has
  // left the chunk kDecayTurns before.
  __device__ __forceinline__ void make_decays(int i, unsigned turn) {
    const chunk::RowTokens& tokens = work.item.tokens;
    if ((i & (num_turns() - 1)) != first_turn() || i >= work.item.end) return;
    clock.store_decays(shared.decays(turn, warp & (num_heads - 1)), dt, tokens.chunk(i));
    dt = clock.load_dt(tokens.chunk(i + num_turns()));
  }

  // Warps of a head, a power of two, and which of them this one is.
  __device__ __forceinline__ int num_turns() const { return num_heads == 1 ? kGroupWarps : kGroupWarps / kMaxHeads; }
  __device__ __forceinline__ int first_turn() const { return num_heads == 1 ? warp : warp / kMaxHeads; }

  __device__ __forceinline__ void run(unsigned& turn) {
    dt = clock.load_dt(work.item.tokens.chunk(first_turn()));
    for (int i = 0; i < work.item.end + kAhead; ++i) {
      if (i < work.item.end) {
        fetch(i, turn + i);
        if (i < 2 * kDecaysAhead) make_decays(i, turn + i);
        shared.fetched_barrier(turn + i).arrive();
      }
      if (i >= kAhead) weigh(turn + i - kAhead);
      if (i >= kDecaysAhead) make_decays(i + kDecaysAhead, turn + i + kDecaysAhead);
    }
    turn += work.item.end;
  }
};

#endif

}  // namespace headway::cuda::warpgroup
