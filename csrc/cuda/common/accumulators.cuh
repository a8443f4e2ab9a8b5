// Accumulators [16, 8 kTiles] of a warp's m16n8k16 products, to and from contiguous rows in global memory. Lane l holds
// of each tile of 8 columns the columns 2 (l % 4) and the next, of rows l / 4 and l / 4 + 8.
#pragma once

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/common/state_rounding.cuh"
#include "cuda/common/vector.cuh"

namespace headway::cuda {

// Offset of the lane's first element. What follows from it stays a constant for the compiler only if it is added to a
// pointer before constants are.
template <int kTiles>
__device__ __forceinline__ int accumulator_lane_offset() {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  return lane / 4 * kTiles * 8 + lane % 4 * 2;
}

// visit(tile, index in it, offset from the lane's first element) for every two neighbours in the first num_rows rows.
template <int kTiles, typename Visit>
__device__ __forceinline__ void for_each_accumulator_pair(int num_rows, Visit&& visit) {
  const int row = static_cast<int>(threadIdx.x) % kWarpSize / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + r * 8 >= num_rows) continue;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) visit(tile, 2 * r, (r * 8 * kTiles + tile) * 8);
  }
}

// source: null for zeros, which rows from num_rows on get as well.
template <int kTiles, typename State>
__device__ __forceinline__ void load_accumulators(float (&values)[kTiles][4], const State* source, int num_rows = 16) {
#pragma unroll
  for (auto& tile : values) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
  if (source == nullptr) return;
  source += accumulator_lane_offset<kTiles>();
  for_each_accumulator_pair<kTiles>(num_rows, [&](int tile, int i, int offset) {
    float pair[2];
    load_floats<State, 2>(source + offset, pair);
    values[tile][i] = pair[0];
    values[tile][i + 1] = pair[1];
  });
}

// Of State __half: values that round_accumulators has made fit.
template <int kTiles, typename State>
__device__ __forceinline__ void store_accumulators(const float (&values)[kTiles][4], State* target, int num_rows = 16) {
  target += accumulator_lane_offset<kTiles>();
  for_each_accumulator_pair<kTiles>(num_rows, [&](int tile, int i, int offset) {
    const float pair[2] = {values[tile][i], values[tile][i + 1]};
    store_floats<State, 2>(target + offset, pair);
  });
}

// To fp16's values. `element`: where the rows begin in the slot.
template <int kTiles>
__device__ __forceinline__ void round_accumulators(float (&values)[kTiles][4], const StateRounding& rounding,
                                                   uint32_t element) {
  element += accumulator_lane_offset<kTiles>();
  for_each_accumulator_pair<kTiles>(16, [&](int tile, int i, int offset) {
    float pair[2] = {values[tile][i], values[tile][i + 1]};
    round_states(rounding, element + offset, pair);
    values[tile][i] = pair[0];
    values[tile][i + 1] = pair[1];
  });
}

}  // namespace headway::cuda
