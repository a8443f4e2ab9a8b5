// sample_edit.cuh's changes, for logits of a piece of the vocabulary that a block holds in registers: what concerns
// each id is collected in shared memory, then each thread edits its own.
#pragma once

#include "core/step_layout.h"
#include "cuda/sample_edit.cuh"

namespace headway::cuda {

inline constexpr int kEditIds = 8192;  // of a piece
inline constexpr uint32_t kDropBit = 0x40000000u;  // beside kSeenBit, above the count of outputs
inline constexpr uint32_t kBiasBit = 0x20000000u;

// By id of the piece. 0: nothing but the token mask concerns it.
struct alignas(16) EditTable {
  uint32_t marks[kEditIds];  // before that, the biases
};

// Every thread of the block calls it; the table is empty when it returns.
__device__ inline void clear_table(EditTable& table) {
  auto* quads = reinterpret_cast<uint4*>(table.marks);
  __syncthreads();  // what was here has been read
  for (int i = static_cast<int>(threadIdx.x); i < kEditIds / 4; i += static_cast<int>(blockDim.x)) {
    quads[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
}

// Of ids from `begin` on.
__device__ inline void mark_edits(const DeviceMirror& mirror, int row, int kv_len, int begin, EditTable& table) {
  const RowSampling& sampling = mirror.sampling[row];
  const auto thread = static_cast<int>(threadIdx.x);
  const auto num_threads = static_cast<int>(blockDim.x);
  const auto mark = [&](int id, uint32_t bit) {
    const int place = id - begin;
    if (place >= 0 && place < kEditIds) atomicOr(&table.marks[place], bit);
  };
  const int32_t* bias_ids = mirror.bias_ids + static_cast<int64_t>(row) * kMaxLogitBias;
  for (int i = thread; i < sampling.num_logit_bias; i += num_threads) mark(bias_ids[i], kBiasBit);
  const RowText text{mirror.history + static_cast<int64_t>(row) * mirror.max_model_len, kv_len};
  drop_bad_words(sampling, mirror.bad_words + static_cast<int64_t>(row) * kMaxBadWordEntries, text,
                 [&](int token) { mark(token, kDropBit); });
  if (masks_stop_ids(sampling, kv_len)) {
    const int32_t* stop_ids = mirror.stop_ids + static_cast<int64_t>(row) * kMaxStopIds;
    for (int i = thread; i < sampling.num_stop_ids; i += num_threads) mark(stop_ids[i], kDropBit);
  }
  if (!has_penalties(sampling)) return;
  const int prompt_len = sampling.prompt_len;
#pragma unroll 4
  for (int position = thread; position < kv_len; position += num_threads) {
    const int place = text.history[position] - begin;
    if (place < 0 || place >= kEditIds) continue;
    atomicOr(&table.marks[place], kSeenBit);
    if (position >= prompt_len) atomicAdd(&table.marks[place], 1u);
  }
}

// Null: all ids are allowed.
__device__ __forceinline__ const uint32_t* token_mask(const DeviceMirror& mirror, int row) {
  if ((mirror.sampling[row].flags & kHasTokenMask) == 0) return nullptr;
  return mirror.token_masks + static_cast<int64_t>(row) * mirror.mask_words;
}

__device__ __forceinline__ bool is_masked(const uint32_t* mask, int id) {
  return mask != nullptr && (mask[id / 32] >> (id % 32) & 1) == 0;
}

// Adds to values[i] the bias of id begin + place(i).
template <int kCount, typename Place>
__device__ void add_biases(float* values, Place place, const DeviceMirror& mirror, int row, int begin,
                           EditTable& table) {
  const int num_biases = mirror.sampling[row].num_logit_bias;
  if (num_biases == 0) return;
  const int32_t* ids = mirror.bias_ids + static_cast<int64_t>(row) * kMaxLogitBias;
  const float* biases = mirror.bias_values + static_cast<int64_t>(row) * kMaxLogitBias;
  auto* sums = reinterpret_cast<float*>(table.marks);
  clear_table(table);
  for (int i = static_cast<int>(threadIdx.x); i < num_biases; i += static_cast<int>(blockDim.x)) {
    const int id = ids[i] - begin;
    if (id >= 0 && id < kEditIds) atomicAdd(&sums[id], biases[i]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] += sums[place(i)];
}

// Edits values[i], the logits of ids begin + place(i) where place(i) < size, at most kEditIds; four by four, places lie
// side by side or far apart. Every thread of the block calls it.
// touch(id, value): for every id that anything but the token mask concerns.
template <int kCount, typename Place, typename Touch>
__device__ void edit_values(float* values, Place place, const DeviceMirror& mirror, int row, int kv_len, int begin,
                            int size, EditTable& table, Touch touch) {
  const RowSampling& sampling = mirror.sampling[row];
  const uint32_t* mask = token_mask(mirror, row);
  add_biases<kCount>(values, place, mirror, row, begin, table);
  clear_table(table);
  mark_edits(mirror, row, kv_len, begin, table);
  __syncthreads();
  constexpr int kUnroll = kCount <= 8 ? kCount / 4 : 1;  // many are not in registers
#pragma unroll kUnroll
  for (int first = 0; first < kCount; first += 4) {
    uint32_t marks[4];
    if (place(first + 3) - place(first) == 3) {
      const uint4 quad = *reinterpret_cast<const uint4*>(&table.marks[place(first)]);
      marks[0] = quad.x, marks[1] = quad.y, marks[2] = quad.z, marks[3] = quad.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) marks[i] = table.marks[place(first + i)];
    }
    if ((marks[0] | marks[1] | marks[2] | marks[3]) == 0 && mask == nullptr) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int in_piece = place(first + i);
      if (in_piece >= size) continue;
      float& value = values[first + i];
      if ((marks[i] & kDropBit) != 0 || is_masked(mask, begin + in_piece)) value = -infinity();
      if ((marks[i] & kSeenBit) != 0) value = penalise(value, marks[i] & ~(kDropBit | kBiasBit), sampling);
      if (marks[i] != 0) touch(begin + in_piece, value);
    }
  }
  __syncthreads();
}

}  // namespace headway::cuda
