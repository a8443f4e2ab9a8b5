#pragma once

#include "params/common.h"

namespace headway {

// out = x / rms(x) * weight per token. With a residual: residual += residual_scale * x first, in place, and the
// sum is what is normalised.
struct RmsNormParams {
  int64_t num_tokens;       // T
  int64_t hidden;           // C
  const void* x;            // [T, C] dtype, rows x_stride apart
  int64_t x_stride;
  void* residual;           // [T, C] dtype, contiguous; may be null
  float residual_scale;
  const void* weight;       // [C] dtype
  void* out;                // [T, C] dtype, contiguous
  float eps;
  DType dtype;
};

// out = rms_norm over groups of (y * silu(z)), times weight (gate first, then norm: Nemotron, Bamba, Granite, Mamba-2).
struct GatedRmsNormParams {
  int64_t num_tokens;       // T
  int64_t hidden;           // d_inner = H * P
  int64_t group_size;       // d_inner / G; divides hidden
  const void* y;            // [T, d_inner] dtype, contiguous
  const void* z;            // [T, d_inner] dtype, rows z_stride apart (a slice of the in_proj output)
  int64_t z_stride;
  const void* weight;       // [d_inner] dtype
  void* out;                // [T, d_inner] dtype, contiguous
  float eps;
  DType dtype;
};

}  // namespace headway
