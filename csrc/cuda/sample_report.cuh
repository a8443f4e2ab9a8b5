// What a row's team says of a token beside its choice: log probability, rank, and the best alternatives.
#pragma once

#include "core/step_layout.h"
#include "cuda/common/math.cuh"
#include "cuda/sample_select.cuh"
#include "params/step.h"

namespace headway::cuda {

inline constexpr float kLeastProbability =
    1e-30f;  // below, its logarithm is not to be had; no such token is ever drawn

struct Best {
  float value;
  int32_t id;
};

// Larger value first, then lower id.
struct BetterOf {
  __device__ Best operator()(const Best& a, const Best& b) const {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
  }
};

struct SumU64 {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

// Everything a row's team shares.
struct RowJob {
  int index;  // of the row in the step
  int row;
  int kv_len;
  const float* logits;  // the whole row, raw
  RowSampling sampling;
  bool is_edited;
  bool needs_slice;  // a second look at the logits
};

__device__ inline Best best_of_slice(const Slice& slice, Best bound, bool is_bounded) {
  Best best{-infinity(), INT32_MAX};
  for (int i = static_cast<int>(threadIdx.x); i < slice.size; i += kSampleThreads) {
    const Best candidate{slice.values[i], slice.begin + i};
    const bool is_worse = candidate.value < bound.value || (candidate.value == bound.value && candidate.id > bound.id);
    if (!is_bounded || is_worse) best = BetterOf{}(best, candidate);
  }
  return best;
}

// What turns a raw logit into its log probability; the largest is kept apart for the sake of the last bits.
struct LogNormaliser {
  float largest;
  float log_mass;  // of the sum of exp(logit - largest)

  __device__ float logprob(float logit) const { return (logit - largest) - log_mass; }
  // Of what is sampled from: by its probability, which is all that is left of a logit once the token is drawn.
  __device__ float processed_logprob(float logit) const {
    const float probability = expf(logit - largest);
    return probability > kLeastProbability ? logf(probability) - log_mass : logprob(logit);
  }
};

__device__ inline LogNormaliser normaliser_of(Team& team, const Slice& slice, float largest) {
  uint64_t sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < slice.size; i += kSampleThreads) {
    sum += mass_of(expf(slice.values[i] - largest));
  }
  sum = team.combine(sum, SumU64{});
  return {largest, logf(static_cast<float>(sum) / kMassUnit)};
}

// The largest values of the slices, best first. A thread keeps its own best and looks again when it was taken.
template <bool kProcessed>
__device__ void report_alternatives(Team& team, const SampleParams& params, const RowJob& job, const Slice& slice,
                                    const LogNormaliser& normaliser, int num_alternatives) {
  const int64_t out = static_cast<int64_t>(job.index) * params.max_logprobs;
  const int wanted = min(min(num_alternatives, params.max_logprobs), params.vocab_size);
  Best mine = best_of_slice(slice, {}, false);
  for (int i = 0; i < wanted; ++i) {
    const Best best = team.combine(mine, BetterOf{});
    if (best.id == mine.id) mine = best_of_slice(slice, best, true);
    if (team.rank() != 0 || threadIdx.x != 0) continue;
    params.top_ids[out + i] = best.id;
    params.top_logprobs[out + i] =
        kProcessed ? normaliser.processed_logprob(best.value) : normaliser.logprob(best.value);
  }
}

// 1 + the number of `values`, which are the slice's part of a row, above the token's.
__device__ inline int rank_of(Team& team, const float* values, const Slice& slice, float value) {
  uint32_t above = 0;
  for (int i = static_cast<int>(threadIdx.x); i < slice.size; i += kSampleThreads) above += values[i] > value ? 1 : 0;
  return 1 + static_cast<int>(team.combine(above, [](uint32_t a, uint32_t b) { return a + b; }));
}

// The value of the slice that holds the token, for all.
__device__ inline float value_of(Team& team, const Slice& slice, int token) {
  const int place = token - slice.begin;
  const float mine = place >= 0 && place < slice.size ? slice.values[place] : -infinity();
  return team.combine(mine, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace headway::cuda
