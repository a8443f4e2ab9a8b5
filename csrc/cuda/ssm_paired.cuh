// The chunked scan on warpgroup products (sm_90a) in blocks of two warpgroups, two of them on a multiprocessor, for
// more tiles than there are multiprocessors: what one block waits for, the other hides. Products, operands and their
// order are those of ssm_warpgroup.cuh's blocks, so that bits do not depend on which of the two runs. The tile's
// warpgroup is ssm_warpgroup_tile.cuh's. The other makes the weights, has the copy engine fetch the data and turns dt
// into decays.
#pragma once

#include "cuda/ssm_chunk_maps.cuh"
#include "cuda/ssm_warpgroup_scores.cuh"

namespace headway::cuda::paired {

using namespace warpgroup;
using chunk::Maps;

inline constexpr int kBlockThreads = 2 * kGroupThreads;  // the tile's warpgroup, then the scores'
inline constexpr int kResidentBlocks = 2;  // a multiprocessor

// Registers a thread, of 128 that all begin with.
inline constexpr int kTileRegisters = 168;
inline constexpr int kScoreRegisters = 88;
inline constexpr int kBlockRegisters = (kTileRegisters + kScoreRegisters) / 2;

inline constexpr int kDecayTurns = 8;
template <int kN>
struct BlockShared : Handover<kN, /*kHeads=*/1, kN == 128 ? 2 : 3, kDecayTurns, /*kFetchArrivals=*/1, kGroupThreads> {
  static constexpr bool kIsWeighed = false;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename Memory>
struct ScoreGroup : warpgroup::ScoreGroup<Memory> {
  using Base = warpgroup::ScoreGroup<Memory>;
  using Base::kN;
  using Base::shared;
  using Base::thread;
  using Base::warp;
  using Base::work;
  // Decays are made so many chunks at a time, one by each warp, and kAhead chunks or more before they are used.
  static constexpr int kDecayChunks = kGroupWarps;
  static constexpr int kAhead = 2;
  static_assert(2 * kDecayChunks <= kDecayTurns);
  const Maps& maps;
  chunk::HeadClock clock;
  chunk::HeadClock::RawPair dt;  // of the decays made next

  __device__ __forceinline__ ScoreGroup(const Work& block_work, const Maps& block_maps, Memory& memory)
      : Base(block_work, memory), maps(block_maps), clock(block_work.params, block_work.first_head()) {}

  // Meets the threads of the warpgroup.
  __device__ __forceinline__ static void meet() { asm volatile("bar.sync 2, %0;" ::"n"(kGroupThreads) : "memory"); }

  template <int kCount>
  __device__ __forceinline__ void copy_panels(Panel (&panels)[kCount], const CUtensorMap& map, int token,
                                              Barrier barrier) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int indices[4] = {work.group * kN + i * wgmma::kPanelColumns, token, 0, 0};
      copy_box(shared_address(&panels[i]), map, indices, barrier);
    }
  }

  // One thread: starts the copies of the row's index-th chunk.
  __device__ __forceinline__ void copy_chunk(int index, unsigned turn) const {
    Stage<kN>& stage = shared.stage(turn);
    const int token = work.item.tokens.chunk(index).token;
    const Barrier barrier = shared.fetched_barrier(turn);
    wgmma::publish_operands();  // outputs left through the place of x
    barrier.arrive_expecting(sizeof(stage));
    copy_panels(stage.C, maps.C, token, barrier);
    copy_panels(stage.B, maps.B, token, barrier);
    const int indices[4] = {work.flat_channel(work.first_channel), token, 0, 0};
    copy_box(shared_address(&stage.x), maps.x, indices, barrier);
  }

  // Zeros for the tokens beyond the row's end: another row's, or nobody's, of any value. Those of C only make outputs
  // that nobody stores.
  __device__ __forceinline__ void clear_rest(Stage<kN>& stage, int count) const {
    constexpr int kRowPieces = wgmma::kPanelRowBytes / sizeof(uint4);
    const auto clear = [&](Panel& panel) {
      for (int piece = count * kRowPieces + thread; piece < kTokens * kRowPieces; piece += kGroupThreads) {
        reinterpret_cast<uint4*>(panel.values)[piece] = uint4{};
      }
    };
    clear(stage.x);
    for (auto& panel : stage.B) clear(panel);
    wgmma::publish_operands();
    meet();
  }

  // Of the row's chunks from `first` on, the block's chunk `turn`.
  __device__ __forceinline__ void store_decays(int first, unsigned turn) {
    const Chunk chunk = work.item.tokens.chunk(first + warp);
    if (chunk.count > 0) clock.store_decays(shared.decays(turn + warp, 0), dt, chunk);
    dt = clock.load_dt(work.item.tokens.chunk(first + warp + kDecayChunks));
    meet();
  }

  __device__ __forceinline__ void run(unsigned& turn) {
    const int num_chunks = work.item.tokens.num_chunks();
    dt = clock.load_dt(work.item.tokens.chunk(warp));
    if (thread == 0) {
      for (int i = 0; i < min(num_chunks, Memory::kStages); ++i) {
        shared.wait_free(turn + i, Memory::kStages);  // the tile may be at the item before
        copy_chunk(i, turn + i);
      }
    }
    store_decays(0, turn);
    float scores[8][4] = {};
    for (int i = 0; i < num_chunks; ++i, ++turn) {
      shared.wait_free(turn, 2);
      const int next = i - 2 + Memory::kStages;  // into the stage that has become free
      if (thread == 0 && i >= 2 && next < num_chunks) copy_chunk(next, turn - i + next);
      if ((i + kAhead) % kDecayChunks == 0) store_decays(i + kAhead, turn + kAhead);
      shared.wait_fetched(turn);
      Stage<kN>& stage = shared.stage(turn);
      if (const int count = work.item.tokens.chunk(i).count; count < kTokens) clear_rest(stage, count);
      this->start_scores(stage, scores);
      this->await_scores(scores);
      this->store_weights(scores, shared.decays(turn, 0), shared.weights[turn % 2][0]);
      wgmma::publish_operands();
      shared.arrive_ready(turn);
    }
  }
};

#endif

}  // namespace headway::cuda::paired
