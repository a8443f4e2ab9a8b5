// What the tensor core attention kernels share: one 16 x 64 tile of the online softmax, its product with the values,
// and the folding of partial sums. Every rounding is spelled out (no contraction is left to the compiler), so that sums
// cut at different nodes of the same tree agree bit for bit. Online softmax: Milakov and Gimelshein, 2018; tiling: Dao
// et al., "FlashAttention", 2022.
#pragma once

#include "cuda/attention.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/rows.cuh"

namespace headway::cuda {

inline constexpr int kScoreTiles = kTileKeys / 8;  // column tiles of 8 keys

__device__ __forceinline__ float minus_infinity() {
  return -__int_as_float(0x7f800000);
}

// Shared-memory rows of kDim 16-bit elements, an odd number of 16-byte pieces apart, so that the eight rows of a matrix
// load fall into different banks.
template <int kDim>
struct TileRows {
  static constexpr int kPieces = kDim / 8;
  static constexpr int kStrideBytes = (kPieces | 1) * 16;

  __device__ static uint32_t piece(uint32_t base, int row, int index) { return base + row * kStrideBytes + index * 16; }
};

// Of the two rows a lane holds (lane / 4 and lane / 4 + 8): the largest raw score, and the sum of the exponentials
// below it. The sum is this lane's share until finish_sums.
struct SoftmaxState {
  float largest[2] = {minus_infinity(), minus_infinity()};
  float sum[2] = {0.0f, 0.0f};
};

// What earlier sums must be multiplied by when the largest score changes from `before` to `after`. log2_scale > 0. The
// exponent is a difference of the very products that softmax_tile subtracts, so that their rounding cancels.
__device__ __forceinline__ float rescale_factor(float before, float after, float log2_scale) {
  const float reference = after == minus_infinity() ? 0.0f : after;
  return fast_exp2(__fsub_rn(__fmul_rn(before, log2_scale), __fmul_rn(reference, log2_scale)));
}

// Scores -> exp2((score - largest) * log2_scale); updates the state; `factor` is for the accumulator. num_halves: of
// the lane's two rows, those that count.
template <int kTiles>
__device__ __forceinline__ void softmax_tile(float (&scores)[kTiles][4], SoftmaxState& state, float (&factor)[2],
                                             float log2_scale, int num_halves = 2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half >= num_halves) break;
    float largest = state.largest[half];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
    factor[half] = rescale_factor(state.largest[half], largest, log2_scale);
    const float reference = largest == minus_infinity() ? 0.0f : largest;
    const float shift = -__fmul_rn(reference, log2_scale);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float& first = scores[n][2 * half];
      float& second = scores[n][2 * half + 1];
      first = fast_exp2(__fmaf_rn(first, log2_scale, shift));
      second = fast_exp2(__fmaf_rn(second, log2_scale, shift));
      sum = __fadd_rn(sum, __fadd_rn(first, second));
    }
    state.sum[half] = __fmaf_rn(state.sum[half], factor[half], sum);
    state.largest[half] = largest;
  }
}

// Sums over the four lanes that share a row.
__device__ __forceinline__ void finish_sums(SoftmaxState& state) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.sum[half] = __fadd_rn(state.sum[half], __shfl_xor_sync(kFullWarp, state.sum[half], 1));
    state.sum[half] = __fadd_rn(state.sum[half], __shfl_xor_sync(kFullWarp, state.sum[half], 2));
  }
}

template <int kTiles>
__device__ __forceinline__ void scale_rows(float (&values)[kTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    values[n][0] = __fmul_rn(values[n][0], factor[0]);
    values[n][1] = __fmul_rn(values[n][1], factor[0]);
    values[n][2] = __fmul_rn(values[n][2], factor[1]);
    values[n][3] = __fmul_rn(values[n][3], factor[1]);
  }
}

// Factors that merge a part (largest score `later`) into what came before it.
struct MergeFactors {
  float largest;
  float before;
  float later;
};

__device__ __forceinline__ MergeFactors merge_factors(float before, float later, float log2_scale) {
  const float largest = fmaxf(before, later);
  return {largest, rescale_factor(before, largest, log2_scale), rescale_factor(later, largest, log2_scale)};
}

__device__ __forceinline__ float merge(float before, float later, const MergeFactors& factors) {
  return __fmaf_rn(later, factors.later, __fmul_rn(before, factors.before));
}

// 1 / sum; 0 for a row without keys.
__device__ __forceinline__ float reciprocal_of(float sum) {
  return sum == 0.0f ? 0.0f : __frcp_rn(sum);
}

// Probabilities of score tiles 2 j and 2 j + 1 as the left operand of a product over their 16 keys.
template <typename T>
__device__ __forceinline__ void pack_probabilities(uint32_t (&a)[4], const float (&first)[4],
                                                   const float (&second)[4]) {
  a[0] = pack_pair<T>(first[0], first[1]);
  a[1] = pack_pair<T>(first[2], first[3]);
  a[2] = pack_pair<T>(second[0], second[1]);
  a[3] = pack_pair<T>(second[2], second[3]);
}

// The right operand for values of 16 keys and channels 16 pair .. 16 pair + 15.
template <int kDim>
__device__ __forceinline__ void load_values(uint32_t (&b)[4], uint32_t values, int pair, int lane) {
  const int tile = lane / 8;
  load_matrices_transposed(b, TileRows<kDim>::piece(values, tile % 2 * 8 + lane % 8, 2 * pair + tile / 2));
}

// A row of the step as the kernels see it.
struct QueryRow {
  int first_token;  // index into the flat tokens
  int num_queries;
  int first_position;
  int kv_len;
  const int32_t* blocks;  // the row's block table
};

__device__ __forceinline__ QueryRow query_row(const PagedAttentionParams& params, int r) {
  const int begin = params.rows.query_start[r];
  const int num_queries = params.rows.query_start[r + 1] - begin;
  const int start = params.rows.row_start[r];
  const int32_t* table = params.cache.block_table + params.row_ids[r] * params.cache.table_stride;
  return {begin, num_queries, start, start + num_queries, table};
}

// prefix[r] = sum of count(r') over r' < r; prefix[num_rows] = all. Every thread of the block calls it.
template <typename Count>
__device__ void prefix_rows(int32_t* prefix, int num_rows, Count count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int r = static_cast<int>(threadIdx.x); r < num_rows; r += static_cast<int>(blockDim.x)) prefix[r + 1] = count(r);
  if (threadIdx.x == 0) prefix[0] = 0;
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    int running = 0;
    for (int base = 0; base < num_rows; base += kWarpSize) {
      const int r = base + lane;
      int inclusive = r < num_rows ? prefix[r + 1] : 0;
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int other = __shfl_up_sync(kFullWarp, inclusive, offset);
        if (lane >= offset) inclusive += other;
      }
      if (r < num_rows) prefix[r + 1] = running + inclusive;
      running += __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
    }
  }
  __syncthreads();
}

}  // namespace headway::cuda
