// What a block of the decode kernel for any shape works with: its shared memory, and the part of a sum that a thread
// folds.
#pragma once

#include "cuda/attention_leaf.cuh"

namespace headway::cuda {

// Steps ahead of the one under way: the next one's keys are being loaded, the places of the one after are known, and
// the block table is being read for the last.
constexpr int kStepsKnown = 4;

template <int kDim>
struct DecodeMemory {
  static constexpr int kChannels = kDim < kMaxSumChannels ? kDim : kMaxSumChannels;
  static constexpr int kHalfWords = kChannels / 16;  // a lane's, of one of its two rows
  static constexpr int kThreadWords = kHalfWords / 2;  // that a thread folds
  float4 leaves[kDecodeWarps][2][kHalfWords][kWarpSize];
  float4 span[kThreadWords + 1][kDecodeThreads];  // sums over the span so far
  uint4 queries[kDim / 32][2][kWarpSize];
  float largest[kDecodeWarps][kFragmentRows];
  float totals[kDecodeWarps][kFragmentRows];
  Step steps[kStepsKnown];  // of index i at i % kStepsKnown
  uint32_t places[2][kStepKeys];  // of the steps' keys, in 16 bytes: up to 64 GiB of keys a layer
};  // then the prefix sums of the rows' steps

// What a thread holds of a sum while it is folded: one row's channels, and the softmax's state.
template <int kWords>
struct Folded {
  float4 words[kWords];
  float largest;
  float total;

  __device__ void reset() {
    largest = minus_infinity();
    total = 0.0f;
#pragma unroll
    for (auto& word : words) word = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  __device__ MergeFactors begin_merge(float later, float later_total, float log2_scale) {
    const MergeFactors factors = merge_factors(largest, later, log2_scale);
    largest = factors.largest;
    total = merge(total, later_total, factors);
    return factors;
  }

  __device__ void merge_word(int i, const float4& later, const MergeFactors& factors) {
    words[i].x = merge(words[i].x, later.x, factors);
    words[i].y = merge(words[i].y, later.y, factors);
    words[i].z = merge(words[i].z, later.z, factors);
    words[i].w = merge(words[i].w, later.w, factors);
  }

  __device__ void add(const Folded& later, float log2_scale) {
    const MergeFactors factors = begin_merge(later.largest, later.total, log2_scale);
#pragma unroll
    for (int i = 0; i < kWords; ++i) merge_word(i, later.words[i], factors);
  }
};

}  // namespace headway::cuda
