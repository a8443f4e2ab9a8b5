// The copies' warpgroup of ssm_wide.cuh: has the copy engine fetch the chunks, as many ahead as there are stages,
// turns dt into decays and, once a chunk is there, weighs its x for the state.
#pragma once

#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_wide.cuh"

namespace headway::cuda::wide {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kN, int kP>
struct CopyGroup {
  using Memory = Shared<kN, kP>;
  static constexpr int kAhead = 2;  // a chunk is weighed when so many have been asked for
  const Work& work;
  const chunk::RowTokens& tokens;
  Memory& shared;
  int thread;
  int warp;
  chunk::HeadClock clock;
  int group;

  __device__ __forceinline__ CopyGroup(const Work& block_work, Memory& memory)
      : work(block_work),
        tokens(block_work.item.tokens),
        shared(memory),
        thread(group_thread()),
        warp(group_warp()),
        clock(block_work.params, block_work.head),
        group(block_work.group()) {}

  // visit(offset within a panel of kColumns columns in use, row, column) for each of the thread's 16-byte pieces.
  template <int kColumns, typename Visit>
  __device__ __forceinline__ void for_each_piece(Visit&& visit) const {
    constexpr int kPieces = kColumns / 8;
    constexpr int kRows = kGroupThreads / kPieces;  // at once; a multiple of 8, so a thread's swizzle stays
    static_assert(kRows % 8 == 0);
    const int row = thread / kPieces;
    const int column = thread % kPieces * 8;
    const int offset = wgmma::panel_offset(row, column);
#pragma unroll
    for (int i = 0; i < kTokens / kRows; ++i) visit(offset + i * kRows * kPanelColumns, row + i * kRows, column);
  }

  template <int kCount>
  __device__ __forceinline__ void copy_panels(Panel<kTokens> (&panels)[kCount], const CUtensorMap& map, int column,
                                              int token, Barrier barrier) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int indices[4] = {column + i * kPanelColumns, token, 0, 0};
      copy_box(shared_address(&panels[i]), map, indices, barrier);
    }
  }

  // One lane: starts the copies of a chunk. C serves outputs alone.
  __device__ __forceinline__ void copy_chunk(unsigned turn, Chunk chunk, bool has_outputs) const {
    Stage<kN, kP>& stage = shared.stage(turn);
    const Barrier barrier = shared.fetched.full_barrier(turn);
    constexpr uint32_t kBytes = sizeof(stage.x) + sizeof(stage.B);
    wgmma::publish_operands();  // outputs left through the place of C
    barrier.arrive_expecting(kBytes + (has_outputs ? sizeof(stage.C) : 0));
    copy_panels(stage.x, work.maps.x, work.first_channel, chunk.token, barrier);
    copy_panels(stage.B, work.maps.B, group * kN, chunk.token, barrier);
    if (has_outputs) copy_panels(stage.C, work.maps.C, group * kN, chunk.token, barrier);
  }

  // Zeros for the tokens beyond the row's end: another row's, or nobody's, of any value. Those of C only make outputs
  // that nobody stores.
  __device__ __forceinline__ void clear_rest(Stage<kN, kP>& stage, int count) const {
    const auto clear = [&](Panel<kTokens>& panel) {
      for_each_piece<kPanelColumns>([&](int offset, int row, int) {
        if (row >= count) *reinterpret_cast<uint4*>(&panel.values[offset]) = uint4{};
      });
    };
    for (auto& panel : stage.x) clear(panel);
    for (auto& panel : stage.B) clear(panel);
    meet_copies();
  }

  template <int kColumns>
  __device__ __forceinline__ void weigh_panel(const Panel<kTokens>& x, const Decays& decays,
                                              Panel<kTokens>& weighed) const {
    for_each_piece<kColumns>([&](int offset, int row, int) {
      const float weight = decays.to_end[row];
      uint4 piece = *reinterpret_cast<const uint4*>(&x.values[offset]);
      for (uint32_t* word : {&piece.x, &piece.y, &piece.z, &piece.w}) {
        *word = pack_pair<Bf16>(chunk::low_bf16(*word) * weight, chunk::high_bf16(*word) * weight);
      }
      *reinterpret_cast<uint4*>(&weighed.values[offset]) = piece;
    });
  }

  __device__ __forceinline__ void weigh(unsigned turn, int count) const {
    shared.fetched.wait_full(turn);
    Stage<kN, kP>& stage = shared.stage(turn);
    if (count < kTokens) clear_rest(stage, count);
    shared.weights.wait_free(turn);
    constexpr int kLast = kPanels<kP> - 1;
#pragma unroll
    for (int i = 0; i < kLast; ++i) weigh_panel<kPanelColumns>(stage.x[i], stage.decays, shared.weighed[turn % 2][i]);
    weigh_panel<kLastColumns<kP>>(stage.x[kLast], stage.decays, shared.weighed[turn % 2][kLast]);
    wgmma::publish_operands();
    shared.chunks.full_barrier(turn).arrive();
  }

  // The state's warpgroup may still be busy with another row.
  __device__ __forceinline__ void prefetch_state(const float* source) const {
    if (source == nullptr) return;
    constexpr int kLine = 128 / sizeof(float);
    const float* first = source + static_cast<int64_t>(work.first_channel) * kN;
    for (int i = thread; i < kP * kN / kLine; i += kGroupThreads) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(first + i * kLine) : "memory");
    }
  }

  // Warp w fetches every fourth chunk and makes its decays; all weigh each.
  __device__ __forceinline__ void run(Place place) {
    auto dt = clock.load_dt(tokens.chunk(warp));
    for (int i = 0; i < work.item.end + kAhead; ++i) {
      if (i >= kAhead) weigh(place.turn + i - kAhead, tokens.chunk(i - kAhead).count);
      if (i >= work.item.end || i % kGroupWarps != warp) continue;
      const unsigned turn = place.turn + i;
      const Chunk chunk = tokens.chunk(i);
      shared.chunks.wait_free(turn);
      if (is_first_lane()) copy_chunk(turn, chunk, i >= work.item.first_output);
      __syncwarp();
      clock.store_decays(shared.stage(turn).decays, dt, chunk);
      shared.fetched.full_barrier(turn).arrive();
      dt = clock.load_dt(tokens.chunk(i + kGroupWarps));
    }
  }
};

#endif

}  // namespace headway::cuda::wide
