// The channel warps of a chunked scan: each carries the state of 16 channels through the chunks of a row and makes
// their outputs. As an accumulator [16 channels, N] the state is laid out as the operand of C . s wants it, and the
// fragments of x serve the outputs and, transposed, the state.
#pragma once

#include <type_traits>

#include "cuda/common/accumulators.cuh"
#include "cuda/ssm_chunk.cuh"

namespace headway::cuda::chunk {

template <int kN, int kSlice, typename State>
struct ChannelWarp {
  static constexpr int kTiles = kN / 8;
  static constexpr int kPitch = Shared<kN, kSlice>::kPitch;
  using Memory = Shared<kN, kSlice>;
  const Work& work;
  Memory& shared;
  int first_channel;  // of the warp's 16, within the slice
  int num_channels;   // of the 16 that exist
  float D;
  float state[kTiles][4];         // rows p = lane / 4 (+ 8), columns n = tile * 8 + 2 (lane % 4) (+ 1)
  float y[kNumBlocks][2][4];      // [64 tokens, 16 channels]

  __device__ __forceinline__ ChannelWarp(const Work& block_work, Memory& memory, int warp)
      : work(block_work),
        shared(memory),
        first_channel(warp * kBlock),
        num_channels(min(block_work.num_channels - warp * kBlock, kBlock)),
        D(block_work.params.D[block_work.head]) {}

  // Slots -------------------------------------------------------------------------------------------------------------

  // slot: null for zeros.
  __device__ __forceinline__ void load_state(const State* slot) {
    load_accumulators(state, slot == nullptr ? nullptr : slot + state_offset(), num_channels);
  }

  __device__ __forceinline__ void store_state(State* slot) const {
    store_accumulators(state, slot + state_offset(), num_channels);
  }

  // After each chunk: a state that slots hold as fp16 has its values wherever a prompt may be cut.
  __device__ __forceinline__ void round_state(int position) {
    if constexpr (std::is_same_v<State, __half>) {
      round_accumulators(state, StateRounding(position), static_cast<uint32_t>(state_offset()));
    }
  }

  __device__ __forceinline__ int64_t state_offset() const {
    return (static_cast<int64_t>(work.head) * work.params.head_dim + work.first_channel + first_channel) * kN;
  }

  // Starts the copies of a chunk's x, the warp's channels only.
  __device__ __forceinline__ void copy_chunk(int stage, Chunk chunk) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int row = lane / 2;
    const int column = lane % 2 * 8;
    const int64_t stride = work.params.x_stride;
    const Bf16* from = static_cast<const Bf16*>(work.params.x) + (chunk.token + row) * stride +
                       work.head * work.params.head_dim + work.first_channel + first_channel + column;
    const uint32_t to = shared_address(&shared.x[stage][row * kPitch + first_channel + column]);
    constexpr int kRows = kWarpSize / 2;
#pragma unroll
    for (int i = 0; i < kTokens / kRows; ++i) {
      copy_async(to + i * kRows * kPitch * 2, from, row + i * kRows < chunk.count && column < num_channels);
      from += kRows * stride;
    }
    commit_copies();
  }

  // Chunk -------------------------------------------------------------------------------------------------------------

  // y_i = e^cs_i (C_i . s)
  __device__ __forceinline__ void read_state(int stage) {
    const uint32_t C = shared_address(shared.C[stage]);
    const LaneCell cell = rows_first();
#pragma unroll
    for (auto& block : y) {
#pragma unroll
      for (auto& tile : block) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 2) {
      uint32_t s[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        s[half][0] = pack_pair<Bf16>(state[tile][2 * half], state[tile][2 * half + 1]);
        s[half][1] = pack_pair<Bf16>(state[tile + 1][2 * half], state[tile + 1][2 * half + 1]);
      }
#pragma unroll
      for (int i = 0; i < kNumBlocks; ++i) {
        uint32_t a[4];
        load_matrices(a, C + swizzled<kN>(i * kBlock + cell.row, tile * 8 + cell.column) * 2);
        multiply_add<Bf16>(y[i][0], a, s[0][0], s[0][1]);
        multiply_add<Bf16>(y[i][1], a, s[1][0], s[1][1]);
      }
    }
    const int row = static_cast<int>(threadIdx.x) % kWarpSize / 4;
#pragma unroll
    for (int i = 0; i < kNumBlocks; ++i) {
      const float near = shared.decays[stage].from_start[i * kBlock + row];
      const float far = shared.decays[stage].from_start[i * kBlock + row + 8];
#pragma unroll
      for (auto& tile : y[i]) {
        tile[0] *= near;
        tile[1] *= near;
        tile[2] *= far;
        tile[3] *= far;
      }
    }
  }

  // Block j of x: as operand A its rows are channels, as operand B (0, 2 and 1, 3) its columns are.
  __device__ __forceinline__ void load_x(uint32_t (&x)[4], int stage, int j) const {
    const LaneCell cell = columns_first();
    const int offset = (j * kBlock + cell.row) * kPitch + first_channel + cell.column;
    load_matrices_transposed(x, shared_address(shared.x[stage]) + offset * 2);
  }

  // s = e^cs_L s + sum_j e^(cs_L - cs_j) dt_j x_j B_j^T
  __device__ __forceinline__ void advance_state(int stage) {
    const Decays& decays = shared.decays[stage];
    const float factor = decays.from_start[kTokens - 1];
#pragma unroll
    for (auto& tile : state) {
#pragma unroll
      for (float& value : tile) value *= factor;
    }
    const uint32_t B = shared_address(shared.B[stage]);
    const LaneCell cell = rows_first();
#pragma unroll
    for (int j = 0; j < kNumBlocks; ++j) {
      uint32_t x[4];
      load_x(x, stage, j);
      const int token = j * kBlock + static_cast<int>(threadIdx.x) % 4 * 2;
      const float2 near = *reinterpret_cast<const float2*>(&decays.to_end[token]);
      const float2 far = *reinterpret_cast<const float2*>(&decays.to_end[token + 8]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 weight = i < 2 ? near : far;
        x[i] = pack_pair<Bf16>(low_bf16(x[i]) * weight.x, high_bf16(x[i]) * weight.y);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, B + swizzled<kN>(j * kBlock + cell.row, tile * 8 + cell.column) * 2);
        multiply_add<Bf16>(state[tile], x, b[0], b[1]);
        multiply_add<Bf16>(state[tile + 1], x, b[2], b[3]);
      }
    }
  }

  // y += weights . x
  __device__ __forceinline__ void add_tokens(int stage) {
    const uint32_t weights = shared_address(shared.weights);
    const LaneCell cell = rows_first();
#pragma unroll
    for (int j = 0; j < kNumBlocks; ++j) {
      uint32_t x[4];
      load_x(x, stage, j);
#pragma unroll
      for (int i = j; i < kNumBlocks; ++i) {
        uint32_t a[4];
        load_matrices(a, weights + swizzled<kTokens>(i * kBlock + cell.row, j * kBlock + cell.column) * 2);
        multiply_add<Bf16>(y[i][0], a, x[0], x[2]);
        multiply_add<Bf16>(y[i][1], a, x[1], x[3]);
      }
    }
  }

  // y + D x, in the place of x to 16-byte stores.
  __device__ __forceinline__ void store_outputs(int stage, Chunk chunk) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    Bf16* staged = &shared.x[stage][first_channel];
    __syncwarp();  // all of x has been read as operands
#pragma unroll
    for (int i = 0; i < kNumBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 4; ++half) {
        const int row = i * kBlock + lane / 4 + half / 2 * 8;
        auto* place = reinterpret_cast<uint32_t*>(&staged[row * kPitch + half % 2 * 8 + lane % 4 * 2]);
        const float* sum = &y[i][half % 2][half / 2 * 2];
        *place = pack_pair<Bf16>(fmaf(D, low_bf16(*place), sum[0]), fmaf(D, high_bf16(*place), sum[1]));
      }
    }
    __syncwarp();
    const int row = lane / 2;
    const int column = lane % 2 * 8;
    const int64_t stride = static_cast<int64_t>(work.params.num_heads) * work.params.head_dim;
    Bf16* out = static_cast<Bf16*>(work.params.out) + (chunk.token + row) * stride + work.head * work.params.head_dim +
                work.first_channel + first_channel + column;
    constexpr int kRows = kWarpSize / 2;
#pragma unroll
    for (int i = 0; i < kTokens / kRows; ++i) {
      if (row + i * kRows < chunk.count && column < num_channels) {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(&staged[(row + i * kRows) * kPitch + column]);
      }
      out += kRows * stride;
    }
  }
};

}  // namespace headway::cuda::chunk
