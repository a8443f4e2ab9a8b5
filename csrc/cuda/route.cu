// Chooses each token's experts. One warp a token: the scores stay in registers, and K rounds of a warp-wide maximum
// pick the best. Rounds compare (score, lower id), so the choice does not depend on how experts lie on lanes.
#include "cuda/common/check.h"
#include "cuda/common/reduce.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "route";
constexpr int kWarps = 4;
constexpr int kMaxExperts = 1024;
constexpr int kMaxGroups = 32;  // a lane keeps one group's score

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

__device__ Candidate warp_best(Candidate best) {
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

template <int kItems>
__global__ void __launch_bounds__(kWarps* kWarpSize) route_kernel(RouteParams params) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (token >= params.num_tokens) return;
  Scores<kItems> scores = load_scores<kItems>(params, params.logits + token * params.num_experts, lane);
  if (params.topk_group < params.num_groups) keep_best_groups(params, scores, lane);

  // Choose; lane `round % 32` remembers a round's choice until the sum is known.
  float* weights = params.weights + token * params.top_k;
  int32_t* expert_ids = params.expert_ids + token * params.top_k;
  float sum = 0.0f;
  for (int round = 0; round < params.top_k; ++round) {
    Candidate best{minus_infinity(), INT32_MAX, 0.0f};
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int id = lane + j * kWarpSize;
      if ((scores.open >> j & 1u) != 0 && is_better(scores.biased[j], id, best)) {
        best = {scores.biased[j], id, scores.score[j]};
      }
    }
    best = warp_best(best);
    if (best.id % kWarpSize == lane) scores.open &= ~(1u << best.id / kWarpSize);
    sum += best.score;
    if (lane == round % kWarpSize) {
      weights[round] = best.score;
      expert_ids[round] = best.id;
    }
  }
  const float divisor = params.normalise ? sum : 1.0f;
  for (int round = lane; round < params.top_k; round += kWarpSize) {
    weights[round] = weights[round] / divisor * params.scale;  // written by this lane above
  }
}

template <int kItems>
void launch(const RouteParams& params, cudaStream_t stream) {
  const auto num_blocks = static_cast<unsigned>((params.num_tokens + kWarps - 1) / kWarps);
  route_kernel<kItems><<<num_blocks, kWarps * kWarpSize, 0, stream>>>(params);
}

}  // namespace

void route(const RouteParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.top_k == 0) return;
  require(params.num_experts <= kMaxExperts, kOp, "num_experts must be at most 1024");
  require(params.num_groups <= kMaxGroups, kOp, "num_groups must be at most 32");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int num_items = (params.num_experts + kWarpSize - 1) / kWarpSize;
  if (num_items <= 2) {
    launch<2>(params, cuda_stream);
  } else if (num_items <= 4) {
    launch<4>(params, cuda_stream);
  } else if (num_items <= 8) {
    launch<8>(params, cuda_stream);
  } else if (num_items <= 16) {
    launch<16>(params, cuda_stream);
  } else {
    launch<32>(params, cuda_stream);
  }
  check_launch(kOp);
}

}  // namespace headway::cuda
