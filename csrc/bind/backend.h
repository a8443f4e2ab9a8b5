// The device a file of bindings is compiled for: HEADWAY_BACKEND=cpu or HEADWAY_BACKEND=cuda, and its ops.
#pragma once

#define HEADWAY_CAT(a, b) a##b
#define HEADWAY_EXPAND(a, b) HEADWAY_CAT(a, b)
#define HEADWAY_IS_CUDA_cpu 0
#define HEADWAY_IS_CUDA_cuda 1
#define HEADWAY_IS_CUDA HEADWAY_EXPAND(HEADWAY_IS_CUDA_, HEADWAY_BACKEND)

#if HEADWAY_IS_CUDA
#include "cuda/ops.h"
#else
#include "cpu/ops.h"
#endif

namespace headway {

namespace backend = HEADWAY_BACKEND;

}  // namespace headway
