// An output warpgroup of ssm_wide.cuh: makes the outputs of every second chunk. Warp w owns 16 of the chunk's tokens
// all through: its scores become, weighed by decays, the operand of the product with x without leaving the registers.
#pragma once

#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_wide.cuh"

namespace headway::cuda::wide {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using wgmma::Rows;

template <int kN, int kP>
struct OutputGroup {
  using Memory = Shared<kN, kP>;
  const Work& work;
  Memory& shared;
  unsigned index;  // of the group
  float D;
  float scores[kTokens / 8][4];       // [tokens, tokens]
  uint32_t weights[kNumBlocks][4];    // the same, as an operand
  float y[kP / 8][4];                 // [tokens, channels]
  uint32_t x[kP / kBlock][4];         // the same

  __device__ __forceinline__ OutputGroup(const Work& block_work, Memory& memory)
      : work(block_work),
        shared(memory),
        index(threadIdx.x / kGroupThreads - 2),
        D(block_work.params.D[block_work.head]) {}

  // Blocks of 16 columns of a row of a panel differ from the first in bits of the address: the swizzle flips bits, too.
  __device__ __forceinline__ static uint32_t panel_bytes(int row, int column) {
    return wgmma::panel_offset(row, column) * sizeof(Bf16);
  }

  // Starts C . B^T.
  __device__ __forceinline__ void start_scores(const Stage<kN, kP>& stage) {
    const uint64_t C = wgmma::describe_uniform(shared_address(stage.C));
    const uint64_t B = wgmma::describe_uniform(shared_address(stage.B));
    wgmma::begin_products();
#pragma unroll
    for (int n = 0; n < kN; n += kBlock) {
      wgmma::multiply_shared<Rows::kAlongSum>(scores, C + columns_on<kTokens>(n), B + columns_on<kTokens>(n), n > 0);
    }
    wgmma::commit_products();
  }

  // Starts y = C . s.
  __device__ __forceinline__ void start_reading(const Stage<kN, kP>& stage, const Panel<kP> (&state)[kPanels<kN>]) {
    const uint64_t C = wgmma::describe_uniform(shared_address(stage.C));
    const uint64_t s = wgmma::describe_uniform(shared_address(&state[0]));
    wgmma::begin_products();
#pragma unroll
    for (int n = 0; n < kN; n += kBlock) {
      wgmma::multiply_shared<Rows::kAlongSum>(y, C + columns_on<kTokens>(n), s + columns_on<kP>(n), n > 0);
    }
    wgmma::commit_products();
  }

  // (C_i . B_j) e^(cs_i - cs_j) dt_j for j <= i.
  template <int kWarp>
  __device__ __forceinline__ void make_warp_weights(const Decays& decays) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int row = kWarp * kBlock + lane / 4;
    const int first_column = lane % 4 * 2;
    const float row_sum[2] = {decays.log2_sum[row], decays.log2_sum[row + 8]};
    // Of an 8 x 8 tile on the diagonal.
    const uint32_t mask = (first_column <= lane / 4 ? 0xffffu : 0u) | (first_column < lane / 4 ? 0xffff0000u : 0u);
#pragma unroll
    for (int block = 0; block < kNumBlocks; ++block) {
      if (block > kWarp) {
        weights[block][0] = weights[block][1] = weights[block][2] = weights[block][3] = 0u;
        continue;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = block * kBlock + half * 8 + first_column;
        const float2 log2_weight = *reinterpret_cast<const float2*>(&decays.log2_weight[column]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* score = &scores[2 * block + half][2 * r];
          if (block == kWarp && half == 1 && r == 0) {
            weights[block][2] = 0u;
            continue;
          }
          weights[block][2 * half + r] = pack_pair<Bf16>(fast_exp2(row_sum[r] + log2_weight.x) * score[0],
                                                         fast_exp2(row_sum[r] + log2_weight.y) * score[1]);
        }
      }
      if (block == kWarp) {
        weights[block][0] &= mask;
        weights[block][3] &= mask;
      }
    }
  }
  __device__ __forceinline__ void make_weights(const Stage<kN, kP>& stage) {
    const int warp = group_warp();
    if (warp == 0) make_warp_weights<0>(stage.decays);
    if (warp == 1) make_warp_weights<1>(stage.decays);
    if (warp == 2) make_warp_weights<2>(stage.decays);
    if (warp == 3) make_warp_weights<3>(stage.decays);
  }

  // y_i *= e^cs_i
  __device__ __forceinline__ void decay_outputs(const Decays& decays) {
    const int row = group_warp() * kBlock + static_cast<int>(threadIdx.x) % kWarpSize / 4;
    const float factor[2] = {decays.from_start[row], decays.from_start[row + 8]};
#pragma unroll
    for (auto& tile : y) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[i] *= factor[i / 2];
    }
  }

  // Starts y += weights . x.
  __device__ __forceinline__ void add_tokens(const Stage<kN, kP>& stage) {
    const uint64_t x = wgmma::describe_uniform_panels(shared_address(stage.x), sizeof(Panel<kTokens>));
    wgmma::begin_products();
#pragma unroll
    for (int block = 0; block < kNumBlocks; ++block) {
      wgmma::multiply<Rows::kAcrossSum>(y, weights[block], x + rows_on(block * kBlock), true);
    }
    wgmma::commit_products();
  }

  // x as it lies in y.
  __device__ __forceinline__ void load_x(const Stage<kN, kP>& stage) {
    const chunk::LaneCell cell = chunk::rows_first();
    const uint32_t offset = panel_bytes(group_warp() * kBlock + cell.row, cell.column);
#pragma unroll
    for (int block = 0; block < kP / kBlock; ++block) {
      const uint32_t panel = shared_address(&stage.x[block * kBlock / kPanelColumns]);
      load_matrices(x[block], panel + (offset ^ (block * kBlock % kPanelColumns * sizeof(Bf16))));
    }
  }

  // y + D x of one panel's channels: by way of C's place, whose rows of the warp's tokens nobody else reads, so that
  // a token's channels leave in one run.
  template <int kPanel, int kColumns>
  __device__ __forceinline__ void store_panel(Stage<kN, kP>& stage, Chunk chunk) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int first_row = group_warp() * kBlock;
    const chunk::LaneCell cell = chunk::rows_first();
    const uint32_t offset = panel_bytes(first_row + cell.row, cell.column);
#pragma unroll
    for (int block = 0; block < kColumns / kBlock; ++block) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = x[kPanel * 4 + block][i];
        const float* sum = &y[kPanel * 8 + 2 * block + i / 2][i % 2 * 2];
        words[i] = pack_pair<Bf16>(fmaf(D, chunk::low_bf16(pair), sum[0]), fmaf(D, chunk::high_bf16(pair), sum[1]));
      }
      store_matrices(shared_address(&stage.C[0]) + (offset ^ (block * kBlock * sizeof(Bf16))), words);
    }
    __syncwarp();
    constexpr int kPieces = kColumns / 8;
    constexpr int kRows = kWarpSize / kPieces;  // at once
    const int64_t stride = static_cast<int64_t>(work.params.num_heads) * work.params.head_dim;
    const int column = lane % kPieces * 8;
    const int row = first_row + lane / kPieces;
    Bf16* out = static_cast<Bf16*>(work.params.out) + (chunk.token + row) * stride + work.first_channel +
                kPanel * kPanelColumns + column;
#pragma unroll
    for (int i = 0; i < kBlock / kRows; ++i, out += kRows * stride) {
      const int offset = wgmma::panel_offset(row + i * kRows, column);
      if (row + i * kRows < chunk.count) {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(&stage.C[0].values[offset]);
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void run_chunk(Chunk chunk, const Place& place) {
    Stage<kN, kP>& stage = shared.stage(place.turn);
    shared.chunks.wait_full(place.turn);
    start_scores(stage);
    shared.rounded.wait_full(place.output);
    start_reading(stage, shared.states[index]);
    wgmma::wait_products<1>();
    wgmma::hold(scores);
    make_weights(stage);
    wgmma::wait_products<0>();
    wgmma::hold(y);
    __syncwarp();
    if (is_first_lane()) shared.rounded.free_barrier(place.output).arrive();
    decay_outputs(stage.decays);
    add_tokens(stage);
    load_x(stage);
    wgmma::wait_products<0>();
    wgmma::hold(y);
    wgmma::hold(weights);
    store_panel<0, kPanelColumns>(stage, chunk);
    if constexpr (kPanels<kP> == 2) store_panel<1, kLastColumns<kP>>(stage, chunk);
    shared.chunks.free_barrier(place.turn).arrive();
  }

  __device__ __forceinline__ void run(Place place) {
    // A wait tells a barrier's phases apart only if it skips none.
    for (int i = 0; i < work.item.first_output; ++i, ++place.turn) {
      shared.chunks.wait_full(place.turn);
      if (place.turn % kOutputGroups == index) shared.chunks.free_barrier(place.turn).arrive();
    }
    for (int i = work.item.first_output; i < work.item.end; ++i, ++place.turn, ++place.output) {
      if (place.output % kOutputGroups == index) run_chunk(work.item.tokens.chunk(i), place);
    }
  }
};

#endif

}  // namespace headway::cuda::wide
