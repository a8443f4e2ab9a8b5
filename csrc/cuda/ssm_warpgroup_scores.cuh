// The scores' warpgroup of ssm_warpgroup.cuh: makes the weights (C_i . B_j) e^(cs_i - cs_j) dt_j, which do not depend
// on the state. Warp w owns the chunk's w-th 16 tokens.
#pragma once

#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_warpgroup.cuh"

namespace headway::cuda::warpgroup {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// By the scores' warpgroup, once a block: tokens give nothing to those before them, and store_weights leaves those
// weights alone.
template <typename Memory>
__device__ __forceinline__ void clear_weights(Memory& shared) {
  auto* words = reinterpret_cast<uint4*>(shared.weights);
  for (int i = static_cast<int>(threadIdx.x) - kGroupThreads;
       i < static_cast<int>(sizeof(shared.weights) / sizeof(uint4)); i += kGroupThreads) {
    words[i] = uint4{};
  }
  asm volatile("bar.sync 2, %0;" ::"n"(kGroupThreads) : "memory");
}

template <typename Memory>
struct ScoreGroup {
  static constexpr int kN = Memory::kN;
  using Buffers = Stage<kN>;
  const Work& work;
  Memory& shared;
  int thread;
  int warp;
  int num_heads;

  __device__ __forceinline__ ScoreGroup(const Work& block_work, Memory& memory)
      : work(block_work),
        shared(memory),
        thread(static_cast<int>(threadIdx.x) - kGroupThreads),
        warp(thread / kWarpSize),
        num_heads(block_work.num_heads()) {}

  // Weights -----------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void start_scores(const Buffers& stage, float (&scores)[8][4]) const {
    const uint64_t C = wgmma::describe_uniform(shared_address(stage.C));
    const uint64_t B = wgmma::describe_uniform(shared_address(stage.B));
    wgmma::begin_products();
#pragma unroll
    for (int n = 0; n < kN; n += kBlock) {
      const uint64_t offset = (n / wgmma::kPanelColumns * sizeof(Panel) +
                               n % wgmma::kPanelColumns / kBlock * wgmma::kStepBytes<wgmma::Rows::kAlongSum>) >>
                              4;
      wgmma::multiply_shared<wgmma::Rows::kAlongSum>(scores, C + offset, B + offset, n > 0);
    }
    wgmma::commit_products();
  }

  __device__ __forceinline__ void await_scores(float (&scores)[8][4]) const {
    wgmma::wait_products<0>();
    wgmma::hold(scores);
  }

  // Blocks j <= kWarp of the warp's 16 rows. The warp's index is a constant so that all blocks are under way at once.
  template <int kWarp>
  __device__ __forceinline__ void store_rows(const float (&scores)[8][4], const Decays& decays, Panel& weights) const {
    const int lane = fresh_thread() % kWarpSize;
    const int row = kWarp * kBlock + lane / 4;
    const float row_sum[2] = {decays.log2_sum[row], decays.log2_sum[row + 8]};
    const chunk::LaneCell cell = chunk::rows_first();
    const uint32_t first = shared_address(&weights.values[kWarp * kBlock * wgmma::kPanelColumns]);
#pragma unroll
    for (int block = 0; block <= kWarp; ++block) {
      uint32_t words[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = block * kBlock + half * 8 + lane % 4 * 2;
        const float2 log2_weight = *reinterpret_cast<const float2*>(&decays.log2_weight[column]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* score = &scores[2 * block + half][2 * r];
          float w0 = fast_exp2(row_sum[r] + log2_weight.x) * score[0];
          float w1 = fast_exp2(row_sum[r] + log2_weight.y) * score[1];
          if (block == kWarp) {  // on the diagonal
            w0 = column <= row + r * 8 ? w0 : 0.0f;
            w1 = column + 1 <= row + r * 8 ? w1 : 0.0f;
          }
          words[2 * half + r] = pack_pair<Bf16>(w0, w1);
        }
      }
      store_matrices(first + wgmma::panel_offset(cell.row, block * kBlock + cell.column) * sizeof(Bf16), words);
    }
  }

  __device__ __forceinline__ void store_weights(const float (&scores)[8][4], const Decays& decays,
                                                Panel& weights) const {
    static_assert(kGroupWarps == 4);
    if (warp == 0) store_rows<0>(scores, decays, weights);
    if (warp == 1) store_rows<1>(scores, decays, weights);
    if (warp == 2) store_rows<2>(scores, decays, weights);
    if (warp == 3) store_rows<3>(scores, decays, weights);
  }

  // Row ---------------------------------------------------------------------------------------------------------------

  // Once fetched. Each thread has copied some of it, and the products read what all have.
  __device__ __forceinline__ void start_chunk(unsigned turn, float (&scores)[8][4]) {
    shared.wait_fetched(turn);
    wgmma::publish_operands();
    start_scores(shared.stage(turn), scores);
  }

  __device__ __forceinline__ void finish_chunk(unsigned turn, const float (&scores)[8][4]) {
    shared.wait_free(turn, 2);
    for (int head = 0; head < num_heads; ++head) {
      store_weights(scores, shared.decays(turn, head), shared.weights[turn % 2][head]);
    }
    wgmma::publish_operands();
    shared.arrive_ready(turn);
  }

  // A chunk's scores are under way while the weights of the one before are made.
  __device__ __forceinline__ void run(unsigned& turn) {
    for (int i = 0; i < work.item.first_output; ++i, ++turn) {
      shared.wait_free(turn, 2);
      shared.wait_fetched(turn);
      wgmma::publish_operands();
      shared.arrive_ready(turn);
    }
    const int num_outputs = work.item.end - work.item.first_output;
    if (num_outputs == 0) return;
    float scores[8][4] = {};
    start_chunk(turn, scores);
    for (int i = 1; i < num_outputs; ++i, ++turn) {
      await_scores(scores);
      float ended[8][4];
#pragma unroll
      for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
        for (int j = 0; j < 4; ++j) ended[tile][j] = scores[tile][j];
      }
      wgmma::hold(ended);
      start_chunk(turn + 1, scores);
      finish_chunk(turn, ended);
    }
    await_scores(scores);
    finish_chunk(turn++, scores);
  }
};

#endif

}  // namespace headway::cuda::warpgroup
