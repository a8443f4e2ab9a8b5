// Products with a packed float32 matrix, for few tokens and for many.
//
// Every output is one sum over its inputs in one order, whatever tokens share the tile, so a token's result is the same
// alone, in a batch and in a chunk. A panel holds the same input of 16 outputs side by side: weights are read once, in
// order, for all tokens of a tile.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/variants.h"

namespace headway::cpu::HEADWAY_SIMD {
namespace {

constexpr int kVectors = kLinearPanel / kLanes;  // of a panel
constexpr int kItemPanels = 4;  // of a work item
// Sums of a tile fill three quarters of the registers; the rest hold weights and one input.
constexpr int kMaxTileTokens = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 3;

// kTokens tokens by kPanels panels, from (token, panel) on.
template <int kTokens, int kPanels>
void multiply_tile(const LinearParams& params, int64_t token, int64_t panel) {
  const int64_t panel_size = params.num_inputs * kLinearPanel;
  const float* x = params.x + token * params.x_stride;
  const float* weight = params.weight + panel * panel_size;
  F32 sums[kTokens][kPanels * kVectors];
  for (int v = 0; v < kPanels * kVectors; ++v) {
    const int64_t begin = panel * kLinearPanel + v * kLanes;
    const int64_t count = params.num_outputs - begin;
    const F32 start = params.bias != nullptr && count > 0 ? load_part(params.bias + begin, count) : F32{};
    for (int t = 0; t < kTokens; ++t) sums[t][v] = start;
  }
  for (int64_t k = 0; k < params.num_inputs; ++k) {
    F32 weights[kPanels * kVectors];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      const float* source = weight + p * panel_size + k * kLinearPanel;
      __builtin_prefetch(source + 32 * kLinearPanel);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weights[p * kVectors + v] = load(source + v * kLanes);
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const F32 input = broadcast(x[t * params.x_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kPanels * kVectors; ++v) sums[t][v] = fma(weights[v], input, sums[t][v]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float* out = params.out + (token + t) * params.out_stride;
    for (int v = 0; v < kPanels * kVectors; ++v) {
      const int64_t begin = panel * kLinearPanel + v * kLanes;
      const int64_t count = params.num_outputs - begin;
      if (count <= 0) break;
      const F32 before = params.is_added ? load_part(out + begin, count) : F32{};
      store_part(out + begin, params.is_added ? before + sums[t][v] : sums[t][v], count);
    }
  }
}

// All tiles of kTokens tokens that fit from `token` on; returns the first token that is left.
template <int kTokens>
int64_t multiply_tokens(const LinearParams& params, int64_t token, int64_t panel_begin, int64_t panel_end) {
  constexpr int kFitting = 2 * kMaxTileTokens / (kTokens * (kLanes == 16 ? 1 : 2));
  constexpr int kPanels = std::clamp(kFitting, 1, kItemPanels);
  for (; token + kTokens <= params.num_tokens; token += kTokens) {
    int64_t panel = panel_begin;
    for (; panel + kPanels <= panel_end; panel += kPanels) multiply_tile<kTokens, kPanels>(params, token, panel);
    for (; panel < panel_end; ++panel) multiply_tile<kTokens, 1>(params, token, panel);
  }
  return token;
}

void multiply_panels(const LinearParams& params, int64_t panel_begin, int64_t panel_end) {
  int64_t token = multiply_tokens<kMaxTileTokens>(params, 0, panel_begin, panel_end);
  if constexpr (kMaxTileTokens > 8) token = multiply_tokens<8>(params, token, panel_begin, panel_end);
  if constexpr (kMaxTileTokens > 4) token = multiply_tokens<4>(params, token, panel_begin, panel_end);
  token = multiply_tokens<2>(params, token, panel_begin, panel_end);
  multiply_tokens<1>(params, token, panel_begin, panel_end);
}

}  // namespace

void linear(const LinearParams& params) {
  const int64_t panels = (params.num_outputs + kLinearPanel - 1) / kLinearPanel;
  const int64_t items = (panels + kItemPanels - 1) / kItemPanels;
  parallel_for(items, params.num_tokens * params.num_outputs * params.num_inputs, [&](int64_t item) {
    multiply_panels(params, item * kItemPanels, std::min((item + 1) * kItemPanels, panels));
  });
}

}  // namespace headway::cpu::HEADWAY_SIMD
