#pragma once

#include "params/common.h"

namespace headway {

enum class Activation : int32_t { kSilu = 0, kRelu2 = 1, kGelu = 2 };

// out = act(gate) * up with x = [gate | up] when is_gated, else out = act(x).
struct ActivationParams {
  int64_t num_tokens;         // T
  int64_t width;              // F: columns of out
  const void* x;              // [T, 2F] (gated) or [T, F] dtype, rows x_stride apart
  int64_t x_stride;
  void* out;                  // [T, F] dtype, contiguous
  Activation activation;
  bool is_gated;
  DType dtype;
};

enum class RouterScore : int32_t { kSoftmax = 0, kSigmoid = 1 };

// Picks top_k experts per token. Scores are softmax or sigmoid of the logits in fp32; bias (when given) steers the
// choice only, not the weight. With groups, only the topk_group groups with the largest sum of their two best biased
// scores compete. Ties go to the lower expert id.
struct RouteParams {
  int64_t num_tokens;         // T
  int32_t num_experts;        // E
  int32_t top_k;              // K
  int32_t num_groups;         // 1 = no groups
  int32_t topk_group;
  RouterScore score;
  bool normalise;             // weights sum to 1 over the chosen
  float scale;                // applied last
  const float* logits;        // [T, E]
  const float* bias;          // [E]; may be null
  float* weights;             // [T, K]
  int32_t* expert_ids;        // [T, K] best first
};

inline constexpr int kRouteGroups = 32;  // of tokens, of one launch

// Router and choice in one launch: logits = weight x in fp32, then as RouteParams says; choice.logits is
// unused.
struct RouteHiddenParams {
  RouteParams choice;
  int32_t hidden;             // C
  const void* x;              // [T, C] dtype, rows x_stride apart
  int64_t x_stride;
  const float* weight;        // [E, C]
  float* logits;              // [T, E]
  int32_t* num_done;          // [kRouteGroups] zero before and after: blocks that have written their logits
  DType dtype;
};

// The experts of few tokens: out = sum over a token's experts of weight * W_out act(W_in x), in order of expert id;
// with results in the order of expert_ids. Made for steps bound by reading the weights: each touched expert's are read
// once.
struct MoeExpertsParams {
  int64_t num_tokens;         // T
  int32_t hidden;             // C
  int32_t width;              // F
  int32_t num_experts;        // E
  int32_t top_k;              // K
  const void* x;              // [T, C] dtype, rows x_stride apart
  int64_t x_stride;
  const float* weights;       // [T, K]
  const int32_t* expert_ids;  // [T, K]
  const void* w_in;           // [E, F, C] dtype, or [E, 2F, C], gate then up, when is_gated
  const void* w_out;          // [E, C, F] dtype
  void* inner;                // [T, K, F] dtype: activations between the two products; unused on a CPU
  void* results;              // [T, K, C] float32 for the experts' results; null: sums by channel (few tokens, CPU)
  void* out;                  // [T, C] dtype, contiguous
  Activation activation;
  bool is_gated;
  DType dtype;                // on a GPU bfloat16 or float16
};

// The end of the experts of many tokens: out = sum over k of weights[t, k] * results[places[t, k]], in fp32.
struct CombineExpertsParams {
  int64_t num_tokens;         // T
  int32_t hidden;             // C
  int32_t top_k;              // K
  const void* results;        // [T K, C] dtype
  const int32_t* places;      // [T, K] rows of results; null: in order
  const float* weights;       // [T, K]
  void* out;                  // [T, C] dtype, contiguous
  DType dtype;
};

}  // namespace headway
