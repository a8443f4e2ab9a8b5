// One warp chooses one token's experts: the scores stay in registers, and K rounds of a warp-wide maximum pick the
// best. Rounds compare (score, lower id), so the choice does not depend on how experts lie on lanes.
#pragma once

#include "cuda/common/check.h"
#include "cuda/common/reduce.cuh"
#include "params/moe.h"

namespace headway::cuda {

inline constexpr int kMaxRoutedExperts = 1024;
inline constexpr int kMaxGroups = 32;  // a lane keeps one group's score

__device__ __forceinline__ float minus_infinity() {
  return -__int_as_float(0x7f800000);
}

// An expert and what it competes with.
struct Candidate {
  float value;
  int id;
  float score;
};

__device__ __forceinline__ bool is_better(float value, int id, const Candidate& other) {
  return value > other.value || (value == other.value && id < other.id);
}

__device__ inline Candidate warp_best(Candidate best) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Candidate other{__shfl_xor_sync(kFullWarp, best.value, offset), __shfl_xor_sync(kFullWarp, best.id, offset),
                          __shfl_xor_sync(kFullWarp, best.score, offset)};
    if (is_better(other.value, other.id, best)) best = other;
  }
  return best;
}

// A lane's experts are lane, lane + 32, ...; `open` has bit j set while its j-th one can still be chosen.
template <int kItems>
struct Scores {
  float score[kItems];   // the weight
  float biased[kItems];  // decides the choice
  uint32_t open;
};

template <int kItems>
__device__ Scores<kItems> load_scores(const RouteParams& params, const float* logits, int lane) {
  Scores<kItems> scores{};
  float best = minus_infinity();
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int id = lane + j * kWarpSize;
    scores.score[j] = id < params.num_experts ? logits[id] : minus_infinity();
    best = fmaxf(best, scores.score[j]);
    if (id < params.num_experts) scores.open |= 1u << j;
  }
  if (params.score == RouterScore::kSoftmax) {
    best = warp_max(best);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      scores.score[j] = (scores.open >> j & 1u) != 0 ? expf(scores.score[j] - best) : 0.0f;
      sum += scores.score[j];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int j = 0; j < kItems; ++j) scores.score[j] /= sum;
  } else {
#pragma unroll
    for (int j = 0; j < kItems; ++j) scores.score[j] = 1.0f / (1.0f + expf(-scores.score[j]));
  }
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int id = lane + j * kWarpSize;
    const bool has_bias = params.bias != nullptr && id < params.num_experts;
    const float biased = scores.score[j] + (has_bias ? params.bias[id] : 0.0f);
    scores.biased[j] = isnan(biased) ? minus_infinity() : biased;  // still a legal choice, the last one
  }
  return scores;
}

// Sum of the two best biased scores of the experts [begin, end); every lane gets it.
template <int kItems>
__device__ float group_score(const Scores<kItems>& scores, int begin, int end, int lane) {
  float first = minus_infinity();
  float second = minus_infinity();
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int id = lane + j * kWarpSize;
    if (id < begin || id >= end) continue;
    second = fmaxf(second, fminf(first, scores.biased[j]));
    first = fmaxf(first, scores.biased[j]);
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const float other_first = __shfl_xor_sync(kFullWarp, first, offset);
    const float other_second = __shfl_xor_sync(kFullWarp, second, offset);
    second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
    first = fmaxf(first, other_first);
  }
  return end - begin > 1 ? first + second : first;
}

// Closes the experts of every group but the topk_group best.
template <int kItems>
__device__ void keep_best_groups(const RouteParams& params, Scores<kItems>& scores, int lane) {
  const int group_size = params.num_experts / params.num_groups;
  Candidate mine{minus_infinity(), kMaxGroups + lane, 0.0f};
  for (int group = 0; group < params.num_groups; ++group) {
    const float score = group_score(scores, group * group_size, (group + 1) * group_size, lane);
    if (lane == group) mine = {score, group, 0.0f};
  }
  uint32_t kept = 0;
  for (int round = 0; round < params.topk_group; ++round) {
    const Candidate best = warp_best(mine);
    if (best.id < kMaxGroups) kept |= 1u << best.id;
    if (best.id == mine.id) mine = {minus_infinity(), 2 * kMaxGroups + lane, 0.0f};
  }
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int id = lane + j * kWarpSize;
    if (id < params.num_experts && (kept >> (id / group_size) & 1u) == 0) scores.open &= ~(1u << j);
  }
}

// Best of a lane's experts that can still be chosen; the lower id among equals. Keys order as the scores do, above 0.
struct Favourite {
  uint32_t key;
  int id;
  float score;
};

__device__ __forceinline__ uint32_t order_key(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 becomes +0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

template <int kItems>
__device__ Favourite favourite(const Scores<kItems>& scores, int lane) {
  Favourite best{0, INT32_MAX, 0.0f};
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const uint32_t key = order_key(scores.biased[j]);
    if ((scores.open >> j & 1u) != 0 && key > best.key) best = {key, lane + j * kWarpSize, scores.score[j]};
  }
  return best;
}

// Writes the token's choice; `logits` may lie in shared memory. Called by all lanes of a warp.
template <int kItems>
__device__ void choose_experts(const RouteParams& params, const float* logits, int64_t token, int lane) {
  Scores<kItems> scores = load_scores<kItems>(params, logits, lane);
  if (params.topk_group < params.num_groups) keep_best_groups(params, scores, lane);

  // Choose; lane `round % 32` remembers a round's choice until the sum is known.
  float* weights = params.weights + token * params.top_k;
  int32_t* expert_ids = params.expert_ids + token * params.top_k;
  float sum = 0.0f;
  for (int round = 0; round < params.top_k; ++round) {
    const Favourite mine = favourite(scores, lane);
    const uint32_t best_key = __reduce_max_sync(kFullWarp, mine.key);
    const int id = __reduce_min_sync(kFullWarp, mine.key == best_key ? mine.id : INT32_MAX);
    const float score = __shfl_sync(kFullWarp, mine.score, id % kWarpSize);
    if (id % kWarpSize == lane) scores.open &= ~(1u << id / kWarpSize);
    sum += score;
    if (lane == round % kWarpSize) {
      weights[round] = score;
      expert_ids[round] = id;
    }
  }
  const float divisor = params.normalise ? sum : 1.0f;
  for (int round = lane; round < params.top_k; round += kWarpSize) {
    weights[round] = weights[round] / divisor * params.scale;  // written by this lane above
  }
}

// Calls body(number of experts a lane holds) with the smallest compiled number that fits.
template <int kCount>
struct ItemsTag {
  static constexpr int kItems = kCount;
};

template <typename Body>
void dispatch_experts(const RouteParams& params, const char* op, Body&& body) {
  require(params.num_experts <= kMaxRoutedExperts, op, "num_experts must be at most 1024");
  require(params.num_groups <= kMaxGroups, op, "num_groups must be at most 32");
  const int num_items = (params.num_experts + kWarpSize - 1) / kWarpSize;
  if (num_items <= 2) return body(ItemsTag<2>{});
  if (num_items <= 4) return body(ItemsTag<4>{});
  if (num_items <= 8) return body(ItemsTag<8>{});
  if (num_items <= 16) return body(ItemsTag<16>{});
  body(ItemsTag<32>{});
}

}  // namespace headway::cuda
