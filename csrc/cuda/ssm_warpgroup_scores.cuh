// The scores' warpgroup of ssm_warpgroup.cuh: fetches the chunks' data, turns dt into decays, and makes the weights
// (C_i . B_j) e^(cs_i - cs_j) dt_j, which do not depend on the state. Warp w owns the chunk's w-th 16 tokens, and the
// decays of the block's w-th head.
#pragma once

#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_warpgroup.cuh"

namespace headway::cuda::warpgroup {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kN, int kTiles>
struct ScoreGroup {
  using Memory = Shared<kN, kTiles>;
  using Buffers = Stage<kN, kTiles>;
  const Work& work;
  Memory& shared;
  int thread;
  int warp;
  int num_heads;
  chunk::HeadClock clock;

  __device__ __forceinline__ ScoreGroup(const Work& block_work, Memory& memory)
      : work(block_work),
        shared(memory),
        thread(static_cast<int>(threadIdx.x) - kTiles * kGroupThreads),
        warp(thread / kWarpSize),
        num_heads(block_work.num_heads()),
        clock(block_work.params, block_work.first_head() + min(warp, num_heads - 1)) {}

  // Copies ------------------------------------------------------------------------------------------------------------

  // kPanels panels side by side: rows of the chunk from `from` on.
  template <int kPanels>
  __device__ __forceinline__ void copy_rows(Panel* target, const Bf16* from, int64_t stride, int count) const {
    constexpr int kPieces = kPanels * 8;
    constexpr int kRows = kGroupThreads / kPieces;  // copied at once; a multiple of 8, so the swizzle stays a thread's
    static_assert(kRows % 8 == 0);
    const int row = thread / kPieces;
    const int column = thread % kPieces * 8;
    const int panel = column / wgmma::kPanelColumns;
    const int offset = wgmma::panel_offset(row, column % wgmma::kPanelColumns);
    const uint32_t to = shared_address(&target[panel].values[offset]);
    from += row * stride + column;
#pragma unroll
    for (int i = 0; i < kTokens / kRows; ++i) {
      copy_async(to + i * kRows * wgmma::kPanelRowBytes, from, row + i * kRows < count);
      from += kRows * stride;
    }
  }

  // Starts the copies of a chunk; without tokens there are none, but they count as a group.
  __device__ __forceinline__ void copy_chunk(Buffers& stage, Chunk chunk) const {
    const SsmScanParams& params = work.params;
    if (chunk.count > 0) {
      constexpr int kPanels = kN / wgmma::kPanelColumns;
      const auto* C = static_cast<const Bf16*>(params.C) + chunk.token * params.c_stride + work.group * kN;
      const auto* B = static_cast<const Bf16*>(params.B) + chunk.token * params.b_stride + work.group * kN;
      copy_rows<kPanels>(stage.C, C, params.c_stride, chunk.count);
      copy_rows<kPanels>(stage.B, B, params.b_stride, chunk.count);
      const auto* x =
          static_cast<const Bf16*>(params.x) + chunk.token * params.x_stride + work.flat_channel(work.first_channel);
      for (int tile = 0; tile < work.num_tiles; ++tile) {
        copy_rows<1>(&stage.x[tile], x + tile * kTileChannels, params.x_stride, chunk.count);
      }
    }
    commit_copies();
  }

  // Weights -----------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void make_scores(const Buffers& stage, float (&scores)[8][4]) const {
    const uint64_t C = wgmma::describe(shared_address(stage.C));
    const uint64_t B = wgmma::describe(shared_address(stage.B));
    wgmma::begin_products();
#pragma unroll
    for (int n = 0; n < kN; n += kBlock) {
      const uint64_t offset = (n / wgmma::kPanelColumns * sizeof(Panel) +
                               n % wgmma::kPanelColumns / kBlock * wgmma::kStepBytes<wgmma::Rows::kAlongSum>) >>
                              4;
      wgmma::multiply_shared(scores, C + offset, B + offset, n > 0);
    }
    wgmma::commit_products();
    wgmma::wait_products<0>();
    wgmma::hold(scores);
  }

  // Once a block: tokens give nothing to those before them, and store_weights leaves those weights alone.
  __device__ __forceinline__ void clear_weights() const {
    auto* words = reinterpret_cast<uint4*>(shared.weights);
    for (int i = thread; i < static_cast<int>(sizeof(shared.weights) / sizeof(uint4)); i += kGroupThreads) {
      words[i] = uint4{};
    }
  }

  // Blocks j <= warp of the warp's 16 rows.
  __device__ __forceinline__ void store_weights(const float (&scores)[8][4], const Decays& decays,
                                                Panel& weights) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int row = warp * kBlock + lane / 4;
    const float row_sum[2] = {decays.log2_sum[row], decays.log2_sum[row + 8]};
    const chunk::LaneCell cell = chunk::rows_first();
#pragma unroll
    for (int block = 0; block < kNumBlocks; ++block) {
      if (block > warp) break;
      uint32_t words[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = block * kBlock + half * 8 + lane % 4 * 2;
        const float2 column_sum = *reinterpret_cast<const float2*>(&decays.log2_sum[column]);
        const float2 dt = *reinterpret_cast<const float2*>(&decays.dt[column]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* score = &scores[2 * block + half][2 * r];
          const float w0 = fast_exp2(fminf(row_sum[r] - column_sum.x, 0.0f)) * dt.x * score[0];
          const float w1 = fast_exp2(fminf(row_sum[r] - column_sum.y, 0.0f)) * dt.y * score[1];
          const int token = block < warp ? kTokens : row + r * 8;  // of the diagonal block, the causal part
          words[2 * half + r] = pack_pair<Bf16>(column <= token ? w0 : 0.0f, column + 1 <= token ? w1 : 0.0f);
        }
      }
      const int offset = wgmma::panel_offset(warp * kBlock + cell.row, block * kBlock + cell.column);
      store_matrices(shared_address(&weights.values[offset]), words);
    }
  }

  // Row ---------------------------------------------------------------------------------------------------------------

  // turn: chunks that the block has finished before; each role counts them alike.
  __device__ __forceinline__ void run(const chunk::RowTokens& tokens, unsigned& turn) {
    int fetched = 0;
    const auto fetch = [&](unsigned chunk_turn) {
      const Chunk ahead = tokens.chunk_at(fetched);
      copy_chunk(shared.stages[chunk_turn % Memory::kStages], ahead);
      fetched += ahead.count;
    };
    Chunk chunk = tokens.chunk_at(0);
    float2 dt = clock.load_dt(chunk);
#pragma unroll
    for (int i = 0; i < Memory::kAhead; ++i) fetch(turn + i);
    float scores[8][4] = {};
    for (int done = 0; chunk.count > 0; ++turn) {
      if (turn >= 2) shared.released_barrier(turn).wait((turn - 2) / 2 % 2);
      fetch(turn + Memory::kAhead);
      done += chunk.count;
      const Chunk next = tokens.chunk_at(done);
      if (warp < num_heads) {
        clock.store_decays(shared.decays[turn % 2][warp], dt, chunk);
        dt = clock.load_dt(next);
      }
      wait_copies<Memory::kAhead>();
      wgmma::publish_operands();
      meet_group(kTiles);
      make_scores(shared.stages[turn % Memory::kStages], scores);
      for (int head = 0; head < num_heads; ++head) {
        store_weights(scores, shared.decays[turn % 2][head], shared.weights[turn % 2][head]);
      }
      wgmma::publish_operands();
      shared.ready_barrier(turn).arrive();
      chunk = next;
    }
  }
};

#endif

}  // namespace headway::cuda::warpgroup
