// The SIMD kernels are compiled once per level, each time in that level's namespace; dispatch.cpp picks one.
#pragma once

#include "cpu/ops.h"

#define HEADWAY_SIMD_OPS(X)                \
  X(rms_norm, RmsNormParams)               \
  X(gated_rms_norm, GatedRmsNormParams)    \
  X(causal_conv1d, CausalConv1dParams)     \
  X(ssm_scan, SsmScanParams)               \
  X(rotary, RotaryParams)                  \
  X(paged_attention, PagedAttentionParams) \
  X(activation, ActivationParams)          \
  X(linear, LinearParams)                  \
  X(moe_experts, MoeExpertsParams)         \
  X(route, RouteParams)                    \
  X(sample, SampleParams)

#define HEADWAY_DECLARE(op, Params) void op(const Params& params);

namespace headway::cpu::avx512 {
HEADWAY_SIMD_OPS(HEADWAY_DECLARE)
}
namespace headway::cpu::avx2 {
HEADWAY_SIMD_OPS(HEADWAY_DECLARE)
}
namespace headway::cpu::plain {
HEADWAY_SIMD_OPS(HEADWAY_DECLARE)
}

#undef HEADWAY_DECLARE
