// What a request changes in its logits before a token is drawn: bias, token mask, bad words, masked stop ids,
// penalties. Each block edits its slice of the vocabulary in place.
#pragma once

#include "core/step_layout.h"
#include "cuda/sample_select.cuh"

namespace headway::cuda {

// Tokens of the history are counted for this many vocabulary ids at a time; the counters share the histograms' memory.
inline constexpr int kCountWindow = 4096;
static_assert(kCountWindow * sizeof(uint32_t) <= sizeof(SelectHistogram));
inline constexpr uint32_t kSeenBit = 0x80000000u;  // above the count of outputs

struct RowText {
  const int32_t* history;  // [kv_len] tokens by position
  int kv_len;
};

__device__ __forceinline__ bool has_penalties(const RowSampling& sampling) {
  return sampling.repetition_penalty != 1.0f || sampling.presence_penalty != 0.0f || sampling.frequency_penalty != 0.0f;
}

__device__ __forceinline__ bool masks_stop_ids(const RowSampling& sampling, int kv_len) {
  return kv_len < sampling.min_total_len && sampling.num_stop_ids > 0;
}

__device__ __forceinline__ bool is_edited(const RowSampling& sampling, int kv_len) {
  return sampling.num_logit_bias > 0 || (sampling.flags & kHasTokenMask) != 0 || sampling.num_bad_words > 0 ||
         masks_stop_ids(sampling, kv_len) || has_penalties(sampling);
}

__device__ __forceinline__ void drop_token(const Slice& slice, int token) {
  const int place = token - slice.begin;
  if (place >= 0 && place < slice.size) slice.values[place] = -infinity();
}

__device__ inline void drop_masked(const Slice& slice, const uint32_t* mask) {
  for (int i = static_cast<int>(threadIdx.x); i < slice.size; i += kSampleThreads) {
    const int token = slice.begin + i;
    if ((mask[token / 32] >> (token % 32) & 1) == 0) slice.values[i] = -infinity();
  }
}

// A bad word's last token cannot follow the others of it. drop: of a token.
template <typename Drop>
__device__ void drop_bad_words(const RowSampling& sampling, const int32_t* ends, const RowText& text, Drop drop) {
  const int32_t* tokens = ends + sampling.num_bad_words;
  for (int i = static_cast<int>(threadIdx.x); i < sampling.num_bad_words; i += static_cast<int>(blockDim.x)) {
    const int begin = i == 0 ? 0 : ends[i - 1];
    const int num_before = ends[i] - begin - 1;
    bool is_match = num_before <= text.kv_len;
    for (int j = 0; is_match && j < num_before; ++j) {
      is_match = tokens[begin + j] == text.history[text.kv_len - num_before + j];
    }
    if (is_match) drop(tokens[begin + num_before]);
  }
}

__device__ inline float penalise(float value, uint32_t seen, const RowSampling& sampling) {
  if (seen == 0) return value;
  const float repetition = sampling.repetition_penalty;
  value = value > 0.0f ? value / repetition : value * repetition;
  const uint32_t count = seen & ~kSeenBit;
  const float presence = count > 0 ? sampling.presence_penalty : 0.0f;
  return value - (sampling.frequency_penalty * static_cast<float>(count) + presence);
}

__device__ inline void apply_penalties(const Slice& slice, const RowSampling& sampling, const RowText& text,
                                       uint32_t* counts) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int window = 0; window < slice.size; window += kCountWindow) {
    const int size = min(kCountWindow, slice.size - window);
    for (int i = thread; i < size; i += kSampleThreads) counts[i] = 0;
    __syncthreads();
    for (int position = thread; position < text.kv_len; position += kSampleThreads) {
      const int i = text.history[position] - slice.begin - window;
      if (i < 0 || i >= size) continue;
      atomicOr(&counts[i], kSeenBit);
      if (position >= sampling.prompt_len) atomicAdd(&counts[i], 1u);
    }
    __syncthreads();
    for (int i = thread; i < size; i += kSampleThreads) {
      slice.values[window + i] = penalise(slice.values[window + i], counts[i], sampling);
    }
    __syncthreads();
  }
}

// Every thread of the block calls it; the slice is complete on return.
__device__ inline void edit_logits(const Slice& slice, const DeviceMirror& mirror, int row, int kv_len,
                                   uint32_t* counts) {
  const RowSampling& sampling = mirror.sampling[row];
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t* bias_ids = mirror.bias_ids + static_cast<int64_t>(row) * kMaxLogitBias;
  const float* bias_values = mirror.bias_values + static_cast<int64_t>(row) * kMaxLogitBias;
  for (int i = thread; i < sampling.num_logit_bias; i += kSampleThreads) {
    const int place = bias_ids[i] - slice.begin;
    if (place >= 0 && place < slice.size) atomicAdd(&slice.values[place], bias_values[i]);
  }
  __syncthreads();
  const RowText text{mirror.history + static_cast<int64_t>(row) * mirror.max_model_len, kv_len};
  if ((sampling.flags & kHasTokenMask) != 0) {
    drop_masked(slice, mirror.token_masks + static_cast<int64_t>(row) * mirror.mask_words);
  }
  drop_bad_words(sampling, mirror.bad_words + static_cast<int64_t>(row) * kMaxBadWordEntries, text,
                 [&](int token) { drop_token(slice, token); });
  if (masks_stop_ids(sampling, kv_len)) {
    const int32_t* stop_ids = mirror.stop_ids + static_cast<int64_t>(row) * kMaxStopIds;
    for (int i = thread; i < sampling.num_stop_ids; i += kSampleThreads) drop_token(slice, stop_ids[i]);
  }
  __syncthreads();
  if (has_penalties(sampling)) apply_penalties(slice, sampling, text, counts);
}

}  // namespace headway::cuda
