// The products of few tokens on the copy engine, of tall matrices (skinny_linear_warpgroup.cu) and of short ones
// (skinny_linear_short.cu), as skinny_linear.cu chooses between them and its own kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "params/linear.h"

namespace headway::cuda {

inline constexpr char kSkinnyLinearOp[] = "skinny_linear";
inline constexpr int kMaxWarpgroupTokens = 64;
inline constexpr int kMaxShortTokens = 32;

// Of a smaller matrix the kernel without the copy engine is the quicker one.
inline bool is_large_matrix(const SkinnyLinearParams& params) {
  constexpr int64_t kMaxSmallBytes = int64_t{16} << 20;
  constexpr int64_t kElementBytes = 2;
  return int64_t{params.num_outputs} * params.num_inputs * kElementBytes > kMaxSmallBytes;
}

// Whether the device and the matrix suit them. Depends on the matrix alone, so that a token's bits do.
bool can_multiply_warpgroups(const SkinnyLinearParams& params);
bool can_multiply_short(const SkinnyLinearParams& params);

// Up to kMaxWarpgroupTokens tokens; x, its rows and the matrix 16-byte aligned.
void launch_warpgroup_linear(const SkinnyLinearParams& params, cudaStream_t stream);

// The same for up to kMaxShortTokens.
void launch_short_linear(const SkinnyLinearParams& params, cudaStream_t stream);

}  // namespace headway::cuda
