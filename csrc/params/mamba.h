#pragma once

#include "core/step_layout.h"
#include "params/common.h"

namespace headway {

// Depthwise causal convolution with silu over ragged rows. Each row continues from its slot's last W-1 raw columns
// (zeros when row_start is 0: the slot is then not read) and leaves the new last W-1 columns there.
struct CausalConv1dParams {
  RowList rows;
  int64_t num_tokens;         // T
  int64_t num_channels;       // conv_dim
  int32_t width;              // W: 2..4
  const void* x;              // [T, conv_dim] dtype, rows x_stride apart (a slice of the in_proj output)
  int64_t x_stride;
  const void* weight;         // [W, conv_dim] dtype: tap-major, so that channels are contiguous
  const void* bias;           // [conv_dim] dtype; may be null
  void* state;                // [num_slots, W - 1, conv_dim] dtype, oldest column first, slots state_stride apart
  int64_t state_stride;
  const int32_t* read_slots;  // [R]
  const int32_t* write_slots; // [R] differs from read_slots where a snapshot is restored without a copy
  void* out;                  // [T, conv_dim] dtype, contiguous
  DType dtype;
  SnapshotList snapshots = {};
};

// Mamba-2 recurrence over ragged rows, state carried in fp32 and rounded (core/state_rounding.h) where slots hold fp16:
//   dt = clamp(softplus(dt_raw + dt_bias), dt_min, dt_max);  S = exp(A dt) S + dt x B^T;  y = S C + D x.
// Head h uses group h / (H / G).
struct SsmScanParams {
  RowList rows;
  int64_t num_tokens;         // T
  int32_t num_heads;          // H
  int32_t head_dim;           // P
  int32_t num_groups;         // G
  int32_t state_size;         // N
  const void* x;              // [T, H, P] dtype, tokens x_stride apart
  int64_t x_stride;
  const void* B;              // [T, G, N] dtype, tokens b_stride apart
  int64_t b_stride;
  const void* C;              // [T, G, N] dtype, tokens c_stride apart
  int64_t c_stride;
  const void* dt;             // [T, H] dtype, raw, tokens dt_stride apart
  int64_t dt_stride;
  const float* A;             // [H] negative
  const float* D;             // [H]
  const float* dt_bias;       // [H]
  float dt_min;
  float dt_max;
  void* state;                // [num_slots, H, P, N] state_dtype, slots state_stride apart
  int64_t state_stride;
  const int32_t* read_slots;  // [R]; not read where row_start is 0
  const int32_t* write_slots; // [R]
  void* out;                  // [T, H, P] dtype, contiguous
  DType dtype;
  DType state_dtype = DType::kFloat32;  // or kFloat16
  int32_t max_query_len = 0;  // host bound on a row's tokens, to choose kernels by; 0 = not known
  SnapshotList snapshots = {};
};

// What a slot keeps beside its state where states are folded once a window: the inputs of the tokens since. Token t
// lies at index t % entries of its ring.
struct StateLogParams {
  void* columns;              // [num_slots, num_entries, H * P + G * N] dtype: x and B after the convolution
  int64_t columns_stride;     // elements between slots, likewise below
  void* dt;                   // [num_slots, num_entries, H] dtype, raw
  int64_t dt_stride;
  void* raw;                  // [num_slots, num_raw, conv_dim] dtype: columns before the convolution
  int64_t raw_stride;
  int32_t num_entries;        // at least window + max_rewind + the longest row
  int32_t num_raw;            // at least max_rewind + the longest row + 3
  int32_t window;             // tokens between canonical bases (core/state_base.h)
  int32_t max_rewind;         // positions that a row may go back: at least 1, and at least the longest row - 1
};

// The decode step of a mixer between its projections: convolution, recurrence, gate and grouped norm for rows of a few
// new tokens, over slots of a state and a log.
struct MambaDecodeParams {
  RowList rows;
  int64_t num_tokens;             // T
  int32_t max_query_len;          // host bound on a row's tokens, at most 8
  int32_t num_heads;              // H
  int32_t head_dim;               // P
  int32_t num_groups;             // G
  int32_t state_size;             // N
  int32_t width;                  // W: 4
  const void* z;                  // [T, H * P] dtype, like columns and dt a slice of the in_proj output
  const void* columns;            // [T, conv_dim] dtype: x, B, C before the convolution
  const void* dt;                 // [T, H] dtype, raw
  int64_t token_stride;           // elements between tokens of z, columns and dt
  const void* conv_weight;        // [W, conv_dim] dtype
  const void* conv_bias;          // [conv_dim] dtype; may be null
  const float* A;                 // [H] negative
  const float* D;                 // [H]
  const float* dt_bias;           // [H]
  float dt_min;
  float dt_max;
  const void* norm_weight;        // [H * P] dtype
  float norm_eps;
  int32_t norm_group_size;
  void* conv_state;               // [num_slots, W - 1, conv_dim] dtype: the columns before state_base
  int64_t conv_state_stride;
  void* ssm_state;  // [num_slots, H, P, N] state_dtype, ssm_state_stride apart: after state_base tokens
  int64_t ssm_state_stride;
  const int32_t* slots;  // [R]; rows of the dummy slot are padding: their outputs are zeros
  const int32_t* state_base;  // [R] tokens folded into the slot's state
  StateLogParams log;
  void* convolved;  // [T, conv_dim] dtype: scratch
  float* table;  // [T, H, 20]: scratch
  void* scanned;  // [T, H * P] dtype: scratch
  void* out;  // [T, H * P] dtype, contiguous
  DType dtype;
  DType state_dtype;  // float32, or float16, rounded (core/state_rounding.h) at canonical bases
};

// States of one layer to slots, with what their logs hold: the target's state has seen the copy's position, its log is
// empty. In place where source and target are one. Before a step's begin_step: state_base is as the step before left
// it.
struct FoldStatesParams {
  int32_t num_copies;
  const StateCopy* copies;  // [num_copies] memory of the device
  const int32_t* state_base;  // [num_slots]
  int32_t num_heads;  // H
  int32_t head_dim;  // P
  int32_t num_groups;  // G
  int32_t state_size;  // N
  const float* A;  // [H] negative
  const float* dt_bias;  // [H]
  float dt_min;
  float dt_max;
  void* conv_state;  // [num_slots, W - 1, conv_dim] dtype, W = 4
  int64_t conv_state_stride;
  void* ssm_state;  // [num_slots, H, P, N] state_dtype
  int64_t ssm_state_stride;
  StateLogParams log;
  DType dtype;
  DType state_dtype;
};

}  // namespace headway
