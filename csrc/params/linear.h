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

}  // namespace headway
