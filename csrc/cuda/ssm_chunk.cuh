// One chunk of the Mamba-2 scan on the tensor cores (state space duality, arXiv 2405.21060, section 6), bf16: what the
// warps of a block share. With cs the running sum of A dt within a chunk (kept in units of log 2), s the state before
// it and L its last token:
//   y_i = e^cs_i (C_i . s) + sum_{j <= i} (C_i . B_j) e^(cs_i - cs_j) dt_j x_j + D x_i
//   s'  = e^cs_L s + sum_j e^(cs_L - cs_j) dt_j B_j x_j^T
// Exponents are differences, never above zero: products of e^cs_i and e^-cs_j would overflow. Operands of the matrix
// products are bf16, sums fp32; the state is rounded only as an operand.
//
// A block owns a slice of one head's channels for one row and walks the row's chunks in order. Each channel warp
// (ssm_chunk_channels.cuh) keeps the whole state of 16 channels in fp32 registers, so the state never meets shared
// memory or another warp. The score warps (ssm_chunk_scores.cuh) make the weights (C_i . B_j) e^(cs_i - cs_j) dt_j of
// the chunk at the same time.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/ssm_chunk_decays.cuh"
#include "cuda/ssm_scan.h"
#include "params/mamba.h"

namespace headway::cuda::chunk {

inline constexpr int kBlock = 16;  // tokens, channels or state columns of one matrix operand
inline constexpr int kNumBlocks = kTokens / kBlock;
inline constexpr int kScoreWarps = kNumBlocks;  // one a block of tokens

// A block's channel warps come first, then its score warps.
template <int kSlice>
inline constexpr int kChannelWarps = kSlice / kBlock;
template <int kSlice>
inline constexpr int kThreads = (kChannelWarps<kSlice> + kScoreWarps) * kWarpSize;

// Shared memory. Rows of B, C and the weights are swizzled (16-byte piece c of row r lies at c ^ (r % 8)), rows of x
// padded to an odd number of 16-byte pieces. Both keep the 8 rows of a matrix load in different banks.
template <int kN, int kSlice>
struct Shared {
  static constexpr int kPitch = kSlice + 8;
  alignas(128) Bf16 B[2][kTokens * kN];
  alignas(128) Bf16 C[2][kTokens * kN];
  alignas(128) Bf16 x[2][kTokens * kPitch];  // a warp's own channels also carry its outputs on their way to memory
  alignas(128) Bf16 weights[kTokens * kTokens];
  alignas(16) Decays decays[2];
};

template <int kColumns>
__device__ __forceinline__ int swizzled(int row, int column) {
  return row * kColumns + (((column / 8) ^ (row & 7)) * 8);
}

// What a block works on, fixed over its life.
struct Work {
  const SsmScanParams& params;
  int head;
  int group;
  int first_channel;  // of the slice, within the head
  int num_channels;   // of the slice that exist
};

}  // namespace headway::cuda::chunk
