// The copies' warpgroup of ssm_warpgroup.cuh: fetches the chunks' data and turns dt into decays, as many chunks ahead
// as there are stages.
#pragma once

#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_warpgroup.cuh"

namespace headway::cuda::warpgroup {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename Memory>
struct CopyGroup {
  static constexpr int kN = Memory::kN;
  using Buffers = Stage<kN>;
  const Work& work;
  Memory& shared;
  int thread;
  int warp;
  int num_heads;
  chunk::HeadClock clock;

  __device__ __forceinline__ CopyGroup(const Work& block_work, Memory& memory)
      : work(block_work),
        shared(memory),
        thread(static_cast<int>(threadIdx.x) - 2 * kGroupThreads),
        warp(thread / kWarpSize),
        num_heads(block_work.num_heads()),
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
  __device__ __forceinline__ void copy_chunk(Buffers& stage, Chunk chunk) const {
    const SsmScanParams& params = work.params;
    constexpr int kPanels = kN / wgmma::kPanelColumns;
    const auto* C = static_cast<const Bf16*>(params.C) + chunk.token * params.c_stride + work.group * kN;
    const auto* B = static_cast<const Bf16*>(params.B) + chunk.token * params.b_stride + work.group * kN;
    const auto* x =
        static_cast<const Bf16*>(params.x) + chunk.token * params.x_stride + work.flat_channel(work.first_channel);
    copy_rows<kPanels, kIsFull>(stage.C, C, params.c_stride, chunk.count);
    copy_rows<kPanels, kIsFull>(stage.B, B, params.b_stride, chunk.count);
    copy_rows<1, kIsFull>(&stage.x, x, params.x_stride, chunk.count);
  }

  __device__ __forceinline__ void run(const chunk::RowTokens& tokens, unsigned& turn) {
    const int num_turns = kGroupWarps / num_heads;
    int next = warp / num_heads;  // chunk that the warp makes decays of: warps take turns, as those take longest
    auto dt = clock.load_dt(tokens.chunk(next));
    Chunk chunk = tokens.chunk_at(0);
    for (int i = 0, done = 0; chunk.count > 0; ++i, ++turn) {
      shared.wait_free(turn, Memory::kStages);
      Buffers& stage = shared.stage(turn);
      if (chunk.count == kTokens) {
        copy_chunk<true>(stage, chunk);
      } else {
        copy_chunk<false>(stage, chunk);
      }
      if (i == next) {
        clock.store_decays(shared.decays(turn, warp % num_heads), dt, chunk);
        next += num_turns;
        dt = clock.load_dt(tokens.chunk(next));
      }
      shared.fetched_barrier(turn).arrive_after_copies();
      shared.fetched_barrier(turn).arrive();
      done += chunk.count;
      chunk = tokens.chunk_at(done);
    }
  }
};

#endif

}  // namespace headway::cuda::warpgroup
