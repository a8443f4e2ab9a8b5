// The experts of many tokens on warpgroups (moe_warpgroup.cu).
#pragma once

#include <cuda_runtime.h>

#include "params/moe.h"

namespace headway::cuda {

inline constexpr char kMoeExpertsOp[] = "moe_experts";

void launch_warpgroup_experts(const MoeExpertsParams& params, cudaStream_t stream);

}  // namespace headway::cuda
