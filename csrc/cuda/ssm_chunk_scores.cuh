// The score warps of a chunked scan: they fetch B and C, turn dt into decays, and make the weights
// (C_i . B_j) e^(cs_i - cs_j) dt_j, which do not depend on the state. Score warp i owns the chunk's i-th 16 tokens.
#pragma once

#include "cuda/ssm_chunk.cuh"
#include "cuda/ssm_chunk_decays.cuh"

namespace headway::cuda::chunk {

template <int kN, int kSlice>
struct ScoreWarp {
  using Memory = Shared<kN, kSlice>;
  const Work& work;
  Memory& shared;
  int block;  // of tokens
  HeadClock clock;

  __device__ __forceinline__ ScoreWarp(const Work& block_work, Memory& memory, int token_block)
      : work(block_work), shared(memory), block(token_block), clock(block_work.params, block_work.head) {}

  // Copies ------------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void copy_rows(Bf16* target, const void* base, int64_t stride, Chunk chunk) const {
    constexpr int kPieces = kN / 8;
    constexpr int kRows = kScoreWarps * kWarpSize / kPieces;  // rows that the score warps copy at once
    static_assert(kRows % 4 == 0);
    const int thread = static_cast<int>(threadIdx.x) - kChannelWarps<kSlice> * kWarpSize;
    const int row = thread / kPieces;
    const int column = thread % kPieces * 8;
    const Bf16* from = static_cast<const Bf16*>(base) + (chunk.token + row) * stride + work.group * kN + column;
    const uint32_t to = shared_address(target);
#pragma unroll
    for (int i = 0; i < kTokens / kRows; ++i) {
      copy_async(to + swizzled<kN>(row + i * kRows, column) * 2, from, row + i * kRows < chunk.count);
      from += kRows * stride;
    }
  }

  // Starts the copies of a chunk's B and C.
  __device__ __forceinline__ void copy_chunk(int stage, Chunk chunk) const {
    copy_rows(shared.C[stage], work.params.C, work.params.c_stride, chunk);
    copy_rows(shared.B[stage], work.params.B, work.params.b_stride, chunk);
    commit_copies();
  }

  // Weights -----------------------------------------------------------------------------------------------------------

  // Blocks j <= kI of the warp's 16 rows.
  template <int kI>
  __device__ __forceinline__ void make_weights(int stage) const {
    const uint32_t B = shared_address(shared.B[stage]);
    const uint32_t C = shared_address(shared.C[stage]);
    const LaneCell a_cell = rows_first();
    const LaneCell b_cell = columns_first();
    float scores[2 * (kI + 1)][4] = {};
#pragma unroll
    for (int n = 0; n < kN; n += kBlock) {
      uint32_t a[4];
      load_matrices(a, C + swizzled<kN>(kI * kBlock + a_cell.row, n + a_cell.column) * 2);
#pragma unroll
      for (int j = 0; j <= kI; ++j) {
        uint32_t b[4];
        load_matrices(b, B + swizzled<kN>(j * kBlock + b_cell.row, n + b_cell.column) * 2);
        multiply_add<Bf16>(scores[2 * j], a, b[0], b[1]);
        multiply_add<Bf16>(scores[2 * j + 1], a, b[2], b[3]);
      }
    }

    const Decays& decays = shared.decays[stage];
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int row = kI * kBlock + lane / 4;
    const float row_sum[2] = {decays.log2_sum[row], decays.log2_sum[row + 8]};
#pragma unroll
    for (int tile = 0; tile < 2 * (kI + 1); ++tile) {
      const int column = tile * 8 + lane % 4 * 2;
      const float2 log2_weight = *reinterpret_cast<const float2*>(&decays.log2_weight[column]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int token = row + r * 8;
        float w0 = fast_exp2(row_sum[r] + log2_weight.x) * scores[tile][2 * r];
        float w1 = fast_exp2(row_sum[r] + log2_weight.y) * scores[tile][2 * r + 1];
        if (tile >= 2 * kI) {  // the diagonal block
          w0 = column <= token ? w0 : 0.0f;
          w1 = column + 1 <= token ? w1 : 0.0f;
        }
        Bf16* target = &shared.weights[swizzled<kTokens>(token, tile * 8) + lane % 4 * 2];
        *reinterpret_cast<uint32_t*>(target) = pack_pair<Bf16>(w0, w1);
      }
    }
  }

  __device__ __forceinline__ void store_weights(int stage) const {
    static_assert(kNumBlocks == 4);
    if (block == 0) make_weights<0>(stage);
    if (block == 1) make_weights<1>(stage);
    if (block == 2) make_weights<2>(stage);
    if (block == 3) make_weights<3>(stage);
  }
};

}  // namespace headway::cuda::chunk
