// Whether this source's code for sm_90a, which alone has warpgroup products, was compiled and is what the device runs.
// For the sources that CMake gives HEADWAY_HAS_SM90A; static, as the answer is each source's own.
#pragma once

#include "cuda/common/device.h"

namespace headway::cuda {

static inline bool runs_sm90a_code([[maybe_unused]] const char* op) {
#if defined(HEADWAY_HAS_SM90A)
  return device_attribute(cudaDevAttrComputeCapabilityMajor, op) == 9;
#else
  return false;
#endif
}

}  // namespace headway::cuda
