#pragma once

#include "params/common.h"

namespace headway {

// Outputs of a panel: a packed matrix is [ceil(num_outputs / kLinearPanel), num_inputs, kLinearPanel], zeros at its
// end.
inline constexpr int kLinearPanel = 16;

// out = x W^T + bias, or out += x W^T + bias, with a matrix packed in panels. CPU, float32.
struct LinearParams {
  int64_t num_tokens;         // T
  int64_t num_inputs;
  int64_t num_outputs;
  const float* x;             // [T, num_inputs], rows x_stride apart
  int64_t x_stride;
  const float* weight;        // packed
  const float* bias;          // [num_outputs]; may be null
  float* out;                 // [T, num_outputs], rows out_stride apart; apart from x
  int64_t out_stride;
  bool is_added;              // to what out holds
};

// out = x W^T + bias, or out += x W^T + bias, for a few tokens and a matrix as torch keeps it; the matrix is read once
// for every 16 tokens, of large ones on sm_90a for every 32 or, if tall, 64. CUDA, bfloat16 or float16.
struct SkinnyLinearParams {
  int32_t num_tokens;         // T
  int32_t num_inputs;         // a multiple of 8
  int32_t num_outputs;
  const void* x;              // [T, num_inputs] dtype, rows x_stride apart
  int64_t x_stride;           // a multiple of 8
  const void* weight;         // [num_outputs, num_inputs] dtype
  const void* bias;           // [num_outputs] dtype; may be null
  void* out;                  // [T, num_outputs] dtype, rows out_stride apart; apart from x
  int64_t out_stride;
  bool is_added;              // to what out holds
  DType dtype;
};

}  // namespace headway
