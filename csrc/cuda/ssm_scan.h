// The two kernels behind ssm_scan, and which tokens of a row each of them computes.
#pragma once

#include <cuda_runtime_api.h>

#include "params/mamba.h"

namespace headway::cuda {

// Computes every row token by token, state in registers: exact fp32 whatever the row's length or cuts.
void launch_recurrent_scan(const SsmScanParams& params, cudaStream_t stream);

}  // namespace headway::cuda
