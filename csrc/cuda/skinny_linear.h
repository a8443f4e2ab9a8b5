// The product of few tokens on the copy engine and warpgroup products (skinny_linear_warpgroup.cu), as
// skinny_linear.cu chooses between it and its own kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "params/linear.h"

namespace headway::cuda {

inline constexpr char kSkinnyLinearOp[] = "skinny_linear";
inline constexpr int kMaxWarpgroupTokens = 64;

// Whether the device and the matrix suit it. Depends on the matrix alone, so that a token's bits do.
bool can_multiply_warpgroups(const SkinnyLinearParams& params);

// Up to kMaxWarpgroupTokens tokens; x, its rows and the matrix 16-byte aligned.
void launch_warpgroup_linear(const SkinnyLinearParams& params, cudaStream_t stream);

}  // namespace headway::cuda
