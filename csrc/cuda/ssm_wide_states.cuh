// The state's warpgroup of ssm_wide.cuh: carries the state through the chunks of a row. Transposed, so that tiles of
// any width a multiple of 16 fill the products: warp w holds rows 16 w to 16 w + 15 of every 64 of N.
#pragma once

#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_wide.cuh"

namespace headway::cuda::wide {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using wgmma::Rows;

template <int kN, int kP>
struct StateGroup {
  using Memory = Shared<kN, kP>;
  static constexpr int kParts = kN / kPanelColumns;
  const Work& work;
  Memory& shared;
  float state[kParts][kP / 8][4];  // [N, kP]

  __device__ __forceinline__ StateGroup(const Work& block_work, Memory& memory) : work(block_work), shared(memory) {}

  // Slots -------------------------------------------------------------------------------------------------------------

  // visit(value, offset within the slot): eight lanes have neighbours.
  template <typename Visit>
  __device__ __forceinline__ void for_each_value(Visit&& visit) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t first = static_cast<int64_t>(work.first_channel + lane % 4 * 2) * kN + group_warp() * 16 + lane / 4;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int tile = 0; tile < kP / 8; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(state[part][tile][i], first + (tile * 8 + i % 2) * kN + part * kPanelColumns + i / 2 * 8);
        }
      }
    }
  }

  // source: the slot, or null for zeros.
  __device__ __forceinline__ void load(const float* source) {
    for_each_value([&](float& value, int64_t offset) { value = source == nullptr ? 0.0f : source[offset]; });
  }

  __device__ __forceinline__ void store(float* target) {
    for_each_value([&](float value, int64_t offset) { target[offset] = value; });
  }

  // Chunk -------------------------------------------------------------------------------------------------------------

  // Leaves the state, rounded, as rows of channels.
  __device__ __forceinline__ void round(Panel<kP> (&target)[kParts]) const {
    const chunk::LaneCell cell = chunk::columns_first();
    const int offset = wgmma::panel_offset(cell.row, group_warp() * kBlock + cell.column);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t first = shared_address(&target[part].values[offset]);
#pragma unroll
      for (int block = 0; block < kP / kBlock; ++block) {
        const auto& left = state[part][2 * block];
        const auto& right = state[part][2 * block + 1];
        const uint32_t words[4] = {pack_pair<Bf16>(left[0], left[1]), pack_pair<Bf16>(left[2], left[3]),
                                   pack_pair<Bf16>(right[0], right[1]), pack_pair<Bf16>(right[2], right[3])};
        store_matrices_transposed(first + block * kBlock * wgmma::kPanelRowBytes, words);
      }
    }
    wgmma::publish_operands();
  }

  // s = e^cs_L s + B^T . weighed x
  __device__ __forceinline__ void advance(const Stage<kN, kP>& stage, const Panel<kTokens> (&weighed)[kPanels<kP>]) {
    const float factor = stage.decays.from_start[kTokens - 1];
#pragma unroll
    for (auto& part : state) {
#pragma unroll
      for (auto& tile : part) {
#pragma unroll
        for (float& value : tile) value *= factor;
      }
    }
    wgmma::begin_products();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint64_t B = wgmma::describe_uniform(shared_address(&stage.B[part]));
      const uint64_t x = wgmma::describe_uniform_panels(shared_address(&weighed[0]), sizeof(Panel<kTokens>));
#pragma unroll
      for (int token = 0; token < kTokens; token += kBlock) {
        wgmma::multiply_shared<Rows::kAcrossSum>(state[part], B + rows_on(token), x + rows_on(token), true);
      }
    }
    wgmma::commit_products();
    wgmma::wait_products<0>();
    for (auto& part : state) wgmma::hold(part);
  }

  // Row ---------------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void run(chunk::SnapshotCursor snapshots, Place place) {
    const chunk::RowTokens& tokens = work.item.tokens;
    for (int i = 0; i < work.item.end; ++i, ++place.turn) {
      const bool has_outputs = i >= work.item.first_output;
      if (has_outputs) {
        shared.rounded.wait_free(place.output);
        round(shared.states[place.output % kOutputGroups]);
        shared.rounded.full_barrier(place.output).arrive();
        ++place.output;
      }
      shared.chunks.wait_full(place.turn);
      advance(shared.stage(place.turn), shared.weighed[place.turn % 2]);
      if (is_first_lane()) shared.weights.free_barrier(place.turn).arrive();
      shared.chunks.free_barrier(place.turn).arrive();
      float* slot = snapshots.take(tokens.start + min(tokens.num_done(i + 1), tokens.num_tokens));
      if (slot != nullptr && has_outputs) store(slot);
    }
  }
};

#endif

}  // namespace headway::cuda::wide
