// The router: scores, groups, the best experts of each token. E is at most a few hundred, so choosing is by repeated
// search for the maximum; ties go to the lower id.
#include <limits>
#include <memory>

#include "cpu/element.h"
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/variants.h"

namespace headway::cpu::HEADWAY_SIMD {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Scratch of one call: scores and what the choice is made by.
struct Scores {
  float* score;   // [E]
  float* biased;  // [E]; -inf: out of the race
};

int argmax(const float* values, int count) {
  int best = 0;
  for (int i = 1; i < count; ++i) best = values[i] > values[best] ? i : best;
  return best;
}

void score_softmax(const float* logits, int count, float* scores) {
  const float peak = logits[argmax(logits, count)];
  F32 total{};
  for (int i = 0; i < count; i += kLanes) {
    const int part = count - i;
    F32 value = exp(load_part(logits + i, part) - peak);
    for (int lane = part; lane < kLanes; ++lane) value[lane] = 0.0f;
    total += value;
    store_part(scores + i, value, part);
  }
  const float sum = reduce_add(total);
  for (int i = 0; i < count; ++i) scores[i] /= sum;
}

void score_sigmoid(const float* logits, int count, float* scores) {
  for (int i = 0; i < count; i += kLanes) store_part(scores + i, sigmoid(load_part(logits + i, count - i)), count - i);
}

// Sum of the two best of count values; of the one if there is but one.
float best_two(const float* values, int count) {
  float first = values[0];
  float second = kMinusInfinity;
  for (int i = 1; i < count; ++i) {
    if (values[i] > first) {
      second = first;
      first = values[i];
    } else if (values[i] > second) {
      second = values[i];
    }
  }
  return count > 1 ? first + second : first;
}

// Takes all but the topk_group best groups out of the race.
void drop_groups(const RouteParams& params, float* biased, float* group_scores) {
  const int size = params.num_experts / params.num_groups;
  for (int group = 0; group < params.num_groups; ++group) group_scores[group] = best_two(biased + group * size, size);
  for (int kept = 0; kept < params.topk_group; ++kept) {
    group_scores[argmax(group_scores, params.num_groups)] = kMinusInfinity;
  }
  for (int group = 0; group < params.num_groups; ++group) {
    if (group_scores[group] == kMinusInfinity) continue;
    for (int i = 0; i < size; ++i) biased[group * size + i] = kMinusInfinity;
  }
}

void choose(const RouteParams& params, const Scores& scores, int64_t token) {
  float* weights = params.weights + token * params.top_k;
  int32_t* ids = params.expert_ids + token * params.top_k;
  float total = 0.0f;
  for (int k = 0; k < params.top_k; ++k) {
    const int best = argmax(scores.biased, params.num_experts);
    scores.biased[best] = kMinusInfinity;
    ids[k] = best;
    weights[k] = scores.score[best];
    total += weights[k];
  }
  for (int k = 0; k < params.top_k; ++k) {
    weights[k] = (params.normalise ? weights[k] / total : weights[k]) * params.scale;
  }
}

}  // namespace

void route(const RouteParams& params) {
  const int count = params.num_experts;
  parallel_for(params.num_tokens, params.num_tokens * count * (8 + params.top_k), [&](int64_t token) {
    const std::unique_ptr<float[]> memory(new float[2 * static_cast<size_t>(count) + params.num_groups]);
    const Scores scores{memory.get(), memory.get() + count};
    const float* logits = params.logits + token * count;
    if (params.score == RouterScore::kSoftmax) {
      score_softmax(logits, count, scores.score);
    } else {
      score_sigmoid(logits, count, scores.score);
    }
    for (int i = 0; i < count; ++i) {
      scores.biased[i] = params.bias == nullptr ? scores.score[i] : scores.score[i] + params.bias[i];
    }
    if (params.topk_group < params.num_groups) drop_groups(params, scores.biased, scores.biased + count);
    choose(params, scores, token);
  });
}

}  // namespace headway::cpu::HEADWAY_SIMD
