// sample_edit.cuh's changes, for logits that a block holds in registers: what concerns some neighbouring ids at a time
// is collected in shared memory, then each thread edits its own.
#pragma once

#include "core/step_layout.h"
#include "cuda/sample_edit.cuh"

namespace headway::cuda {

inline constexpr int kEditWindow = 2048;
inline constexpr uint32_t kDropBit = 0x40000000u;  // beside kSeenBit, above the count of outputs
inline constexpr uint32_t kBiasBit = 0x20000000u;

struct EditTables {
  uint32_t marks[kEditWindow];  // 0: nothing but the token mask concerns the id
  float bias[kEditWindow];
};

// Marks ids [first, first + kEditWindow).
__device__ inline void mark_edits(const DeviceMirror& mirror, int row, int kv_len, int first, EditTables& tables) {
  const RowSampling& sampling = mirror.sampling[row];
  const auto thread = static_cast<int>(threadIdx.x);
  const auto num_threads = static_cast<int>(blockDim.x);
  const auto mark = [&](int id, uint32_t bit) {
    const int place = id - first;
    if (place >= 0 && place < kEditWindow) atomicOr(&tables.marks[place], bit);
  };
  const int32_t* bias_ids = mirror.bias_ids + static_cast<int64_t>(row) * kMaxLogitBias;
  const float* bias_values = mirror.bias_values + static_cast<int64_t>(row) * kMaxLogitBias;
  for (int i = thread; i < sampling.num_logit_bias; i += num_threads) {
    const int place = bias_ids[i] - first;
    if (place < 0 || place >= kEditWindow) continue;
    atomicOr(&tables.marks[place], kBiasBit);
    atomicAdd(&tables.bias[place], bias_values[i]);
  }
  const RowText text{mirror.history + static_cast<int64_t>(row) * mirror.max_model_len, kv_len};
  drop_bad_words(sampling, mirror.bad_words + static_cast<int64_t>(row) * kMaxBadWordEntries, text,
                 [&](int token) { mark(token, kDropBit); });
  if (masks_stop_ids(sampling, kv_len)) {
    const int32_t* stop_ids = mirror.stop_ids + static_cast<int64_t>(row) * kMaxStopIds;
    for (int i = thread; i < sampling.num_stop_ids; i += num_threads) mark(stop_ids[i], kDropBit);
  }
  if (!has_penalties(sampling)) return;
  for (int position = thread; position < kv_len; position += num_threads) {
    const int place = text.history[position] - first;
    if (place < 0 || place >= kEditWindow) continue;
    atomicOr(&tables.marks[place], kSeenBit);
    if (position >= sampling.prompt_len) atomicAdd(&tables.marks[place], 1u);
  }
}

__device__ __forceinline__ bool is_masked(const DeviceMirror& mirror, int row, int id) {
  if ((mirror.sampling[row].flags & kHasTokenMask) == 0) return false;
  const uint32_t* mask = mirror.token_masks + static_cast<int64_t>(row) * mirror.mask_words;
  return (mask[id / 32] >> (id % 32) & 1) == 0;
}

inline constexpr int kWindowSlots = 8;  // of a thread's values, those that may lie in one window

// Edits values[i], the logits of ids begin + place(i) where place(i) < size. All that lie in the window at `first` are
// among the kWindowSlots from slot(first) on. Every thread of the block calls it.
// touch(id, value): for every id that anything but the token mask concerns.
template <typename Slot, typename Place, typename Touch>
__device__ void edit_values(float* values, Slot slot, Place place, const DeviceMirror& mirror, int row, int kv_len,
                            int begin, int size, EditTables& tables, Touch touch) {
  const RowSampling& sampling = mirror.sampling[row];
  for (int first = 0; first < size; first += kEditWindow) {
    __syncthreads();  // the tables have been read
    for (int i = static_cast<int>(threadIdx.x); i < kEditWindow; i += static_cast<int>(blockDim.x)) {
      tables.marks[i] = 0;
      tables.bias[i] = 0.0f;
    }
    __syncthreads();
    mark_edits(mirror, row, kv_len, begin + first, tables);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWindowSlots; ++i) {
      float& value = values[slot(first) + i];
      const int in_piece = place(slot(first) + i);
      const int in_window = in_piece - first;
      if (in_window < 0 || in_window >= kEditWindow || in_piece >= size) continue;
      const uint32_t marks = tables.marks[in_window];
      if ((marks & kBiasBit) != 0) value += tables.bias[in_window];
      if ((marks & kDropBit) != 0 || is_masked(mirror, row, begin + in_piece)) value = -infinity();
      if ((marks & kSeenBit) != 0) value = penalise(value, marks & ~(kDropBit | kBiasBit), sampling);
      if (marks != 0) touch(begin + in_piece, value);
    }
  }
  __syncthreads();
}

}  // namespace headway::cuda
