// What a thread of attention_stream_rows.cuh sums for its two rows, how such sums are merged, and where those of whole
// rows wait for the next span.
#pragma once

#include "cuda/attention_stream.cuh"

namespace headway::cuda::stream {

// The chain, the sums so far of the rows that a piece holds whole: for each eight packed rows of a warpgroup two
// channels of every tile a lane, and the row's state. Each thread reads what it wrote. In the workspace that takes 2 %
// of the time at 64 rows of 8,192 keys: every span would wait for it.
inline constexpr int kOctetRows = 8;
inline constexpr int kOctetWords = (kStreamDim / 8 + 1) * kWarpSize;
inline constexpr int kOctetBytes = kOctetWords * static_cast<int>(sizeof(float2));

// Bytes of the prefix sums, behind which the chains lie.
__host__ __device__ constexpr int prefix_bytes(int num_rows) {
  return (num_rows + 1 + 3) / 4 * 4 * static_cast<int>(sizeof(int32_t));
}

__device__ __forceinline__ float2* shared_chain(const Piece& piece, const DecodeParams& params) {
  const auto* prefix = reinterpret_cast<const unsigned char*>(piece.prefix);
  return reinterpret_cast<float2*>(const_cast<unsigned char*>(prefix) + prefix_bytes(params.attention.rows.num_rows));
}

// Both places that a block has in turns elsewhere.
__device__ __forceinline__ float2* workspace_chain(const DecodeParams& params, const Piece& piece) {
  return reinterpret_cast<float2*>(partial_of(params, serial_place(piece.index, 0)).sums);
}

// `half`: which of the two rows; see SoftmaxState.
template <int kDim>
struct RowSums {
  static constexpr int kTiles = kDim / 8;
  SoftmaxState state;
  float values[kTiles][4];

  __device__ __forceinline__ void append(const RowSums& later, int half, float log2_scale) {
    const MergeFactors factors = merge_factors(state.largest[half], later.state.largest[half], log2_scale);
    state.largest[half] = factors.largest;
    state.sum[half] = merge(state.sum[half], later.state.sum[half], factors);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) values[j][i] = merge(values[j][i], later.values[j][i], factors);
    }
  }

  // words: the lane's first in the chain.
  __device__ __forceinline__ void keep(float2* words, int half) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) words[j * kWarpSize] = make_float2(values[j][2 * half], values[j][2 * half + 1]);
    words[kTiles * kWarpSize] = make_float2(state.largest[half], state.sum[half]);
  }

  // What was kept comes before these.
  __device__ __forceinline__ void prepend_kept(const float2* words, int half, float log2_scale) {
    const float2 before = words[kTiles * kWarpSize];
    const MergeFactors factors = merge_factors(before.x, state.largest[half], log2_scale);
    state.largest[half] = factors.largest;
    state.sum[half] = merge(before.y, state.sum[half], factors);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float2 pair = words[j * kWarpSize];
      values[j][2 * half] = merge(pair.x, values[j][2 * half], factors);
      values[j][2 * half + 1] = merge(pair.y, values[j][2 * half + 1], factors);
    }
  }
};

}  // namespace headway::cuda::stream
