// The two halves of the decode step over slot windows, and the rows as both see them.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <type_traits>

#include "core/state_base.h"
#include "cuda/common/dtype.cuh"
#include "params/mamba.h"

namespace headway::cuda {

inline constexpr int kMaxWindow = 16;  // tokens between canonical bases
inline constexpr int kMaxQuery = 8;    // new tokens of a row
inline constexpr int kMaxEntries = kMaxWindow + kMaxQuery;  // of a row, from its first new token's canonical base on

// Of each token and head: the weight in its output of each input since its canonical base, its own with D, zero beyond,
// then how much of the state there is left. Padded to whole 16-byte pieces.
inline constexpr int kTableWidth = kMaxWindow + 4;

// How much of the step a launch does.
enum class FusedPart { kNothing, kScanned, kAll };

// For few rows: the whole step in one launch, or all but gate and norm (params.scanned); nothing where neither can be
// or pays.
FusedPart launch_decode_fused(const MambaDecodeParams& params, cudaStream_t stream);

// Convolves the new tokens, keeps them in the slots' logs, and fills params.table; C goes to params.convolved.
void launch_decode_inputs(const MambaDecodeParams& params, cudaStream_t stream);

// Reads the state out for the new tokens, and moves it where the window's base moves: params.scanned.
void launch_decode_state(const MambaDecodeParams& params, cudaStream_t stream);

// Calls body(TypeTag<element>, std::integral_constant<int, N>, TypeTag<state>) for a record of a mixer's sizes.
template <typename Params, typename Body>
void dispatch_mixer(const Params& params, const char* op, Body&& body) {
  dispatch_dtype(params.dtype, op, [&](auto tag) {
    dispatch_state(params.state_dtype, op, [&](auto state) {
      if (params.state_size == 64) return body(tag, std::integral_constant<int, 64>{}, state);
      if (params.state_size == 128) return body(tag, std::integral_constant<int, 128>{}, state);
      if (params.state_size == 256) return body(tag, std::integral_constant<int, 256>{}, state);
      require(false, op, "state_size is " + std::to_string(params.state_size) + "; expected 64, 128 or 256");
    });
  });
}

// A row as the step's tensors say.
struct RowRecord {
  int query_start;
  int query_end;
  int row_start;
  int state_base;
  int slot;
};

__device__ __forceinline__ RowRecord record_of(const MambaDecodeParams& params, int row) {
  const int32_t* query_start = params.rows.query_start + row;
  return {query_start[0], query_start[1], params.rows.row_start[row], params.state_base[row], params.slots[row]};
}

// A row of the step and its slot.
struct SlotRow {
  int token;  // the row's first
  int num_tokens;
  int start;  // its position
  int base;
  int next_base;
  int64_t slot;

  __device__ __forceinline__ SlotRow(const MambaDecodeParams& params, int row)
      : SlotRow(params, record_of(params, row)) {}

  __device__ __forceinline__ SlotRow(const MambaDecodeParams& params, const RowRecord& record)
      : token(record.query_start),
        num_tokens(record.query_end - token),
        start(record.row_start),
        base(record.state_base),
        slot(record.slot) {
    const StateWindow window{kMaxWindow, params.log.max_rewind};
    next_base = next_state_base(base, start, start + num_tokens, window);
  }

  __device__ __forceinline__ int canonical(int position) const { return canonical_base(base, position, kMaxWindow); }
  __device__ __forceinline__ bool is_padding() const { return slot == 0; }
};

// Below, Params is any record of a mixer's sizes and log.
template <typename Params>
__device__ __forceinline__ int64_t inner_channels(const Params& params) {
  return static_cast<int64_t>(params.num_heads) * params.head_dim;
}
template <typename Params>
__device__ __forceinline__ int64_t group_states(const Params& params) {
  return static_cast<int64_t>(params.num_groups) * params.state_size;
}
template <typename Params>
__device__ __forceinline__ int64_t conv_channels(const Params& params) {
  return inner_channels(params) + 2 * group_states(params);
}

// The log's columns of ring entry `entry`; `channel` counts those of x and B.
template <typename T, typename Params>
__device__ __forceinline__ T* log_column(const Params& params, int64_t slot, int entry, int64_t channel) {
  return static_cast<T*>(params.log.columns) + slot * params.log.columns_stride +
         entry * (inner_channels(params) + group_states(params)) + channel;
}

template <typename T, typename Params>
__device__ __forceinline__ T* log_dt(const Params& params, int64_t slot, int entry, int head) {
  return static_cast<T*>(params.log.dt) + slot * params.log.dt_stride + entry * params.num_heads + head;
}

}  // namespace headway::cuda
