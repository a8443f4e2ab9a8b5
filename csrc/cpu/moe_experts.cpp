// A step's experts in one call: pairs of (token, chosen expert) sorted by expert, the two products, the weighted sum.
//
// Every element of a product is one sum over its columns in one order, whatever tokens share the tile, so a token's
// result is the same alone, in a batch and in a chunk. Weights are read once for every few tokens of an expert.
#include <algorithm>
#include <memory>

#include "cpu/activate.h"
#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/variants.h"

namespace headway::cpu::HEADWAY_SIMD {
namespace {

constexpr int kTileTokens = kLanes >= 8 ? 4 : 2;
constexpr int kMaxTileRows = 8;
constexpr int64_t kBlockWeights = 1 << 15;  // of a work item: they stay in L2 while its tokens pass

// One expert's product with the vectors of its pairs: out[pair][row] = weight[row] . in[pair].
template <class T, class In>
struct Product {
  const T* weight;  // [rows, columns]
  int64_t num_rows;
  int64_t num_columns;
  const In* const* inputs;  // [pairs]
  float* out;               // [pairs, out_stride]
  int64_t out_stride;
};

// kTokens pairs by kRows rows, from (pair, row) on.
template <int kTokens, int kRows, class T, class In>
void multiply_tile(const Product<T, In>& product, int64_t pair, int64_t row) {
  F32 sums[kLanes] = {};
  const T* weight = product.weight + row * product.num_columns;
  const In* const* inputs = product.inputs + pair;
  const int64_t whole = product.num_columns / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32 value = load(weight + r * product.num_columns + i);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sums[t * kRows + r] = fma(value, load(inputs[t] + i), sums[t * kRows + r]);
    }
  }
  if (whole < product.num_columns) {
    const int64_t part = product.num_columns - whole;
    for (int r = 0; r < kRows; ++r) {
      const F32 value = load_part(weight + r * product.num_columns + whole, part);
      for (int t = 0; t < kTokens; ++t) {
        sums[t * kRows + r] = fma(value, load_part(inputs[t] + whole, part), sums[t * kRows + r]);
      }
    }
  }
  const F32 totals = reduce_add_each(sums);
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) product.out[(pair + t) * product.out_stride + row + r] = totals[t * kRows + r];
  }
}

template <int kTokens, class T, class In>
void multiply_tokens(const Product<T, In>& product, int64_t pair, int64_t row_begin, int64_t row_end) {
  constexpr int kRows = std::min(kMaxTileRows, kLanes / kTokens);  // a tile's sums fill one vector, or half of one
  int64_t row = row_begin;
  for (; row + kRows <= row_end; row += kRows) multiply_tile<kTokens, kRows>(product, pair, row);
  for (; row < row_end; ++row) multiply_tile<kTokens, 1>(product, pair, row);
}

template <class T, class In>
void multiply_block(const Product<T, In>& product, int64_t num_pairs, int64_t row_begin, int64_t row_end) {
  int64_t pair = 0;
  for (; pair + kTileTokens <= num_pairs; pair += kTileTokens) {
    multiply_tokens<kTileTokens>(product, pair, row_begin, row_end);
  }
  for (; pair + 2 <= num_pairs; pair += 2) multiply_tokens<2>(product, pair, row_begin, row_end);
  if (pair < num_pairs) multiply_tokens<1>(product, pair, row_begin, row_end);
}

// The pairs (token * K + k) in the order of their experts.
struct Grouping {
  explicit Grouping(const MoeExpertsParams& params)
      : num_pairs(params.num_tokens * params.top_k),
        begin(new int64_t[static_cast<size_t>(params.num_experts) + 1]()),
        pairs(new int64_t[static_cast<size_t>(num_pairs)]) {
    for (int64_t pair = 0; pair < num_pairs; ++pair) ++begin[params.expert_ids[pair] + 1];
    for (int expert = 0; expert < params.num_experts; ++expert) begin[expert + 1] += begin[expert];
    const std::unique_ptr<int64_t[]> next(new int64_t[static_cast<size_t>(params.num_experts)]);
    for (int expert = 0; expert < params.num_experts; ++expert) next[expert] = begin[expert];
    for (int64_t pair = 0; pair < num_pairs; ++pair) pairs[next[params.expert_ids[pair]]++] = pair;
  }
  int64_t num_pairs;
  std::unique_ptr<int64_t[]> begin;  // [E + 1]
  std::unique_ptr<int64_t[]> pairs;  // [T * K]
};

// All experts' products: out [pairs, rows], inputs in grouped order.
template <class T, class In>
void multiply_experts(const Grouping& groups, int num_experts, const T* weights, int64_t num_rows, int64_t num_columns,
                      const In* const* inputs, float* out) {
  const int64_t fitting = kBlockWeights / num_columns / kMaxTileRows * kMaxTileRows;
  const int64_t block = std::max<int64_t>(kMaxTileRows, fitting);
  const int64_t blocks = (num_rows + block - 1) / block;
  parallel_for(num_experts * blocks, groups.num_pairs * num_rows * num_columns, [&](int64_t item) {
    const int64_t expert = item / blocks;
    const int64_t first = groups.begin[expert];
    const int64_t count = groups.begin[expert + 1] - first;
    if (count == 0) return;
    const Product<T, In> product{weights + expert * num_rows * num_columns,
                                 num_rows,
                                 num_columns,
                                 inputs + first,
                                 out + first * num_rows,
                                 num_rows};
    const int64_t row = item % blocks * block;
    multiply_block(product, count, row, std::min(row + block, num_rows));
  });
}

// In place: row [gate | up] or [value] becomes width activated values.
template <Activation kKind>
void activate_row(float* row, int64_t width, bool is_gated) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t part = width - i;
    const F32 value = activate<kKind>(load_part(row + i, part));
    store_part(row + i, is_gated ? value * load_part(row + width + i, part) : value, part);
  }
}

// out[token] = sum over k, in the order of the routing.
template <class T>
void add_experts(const MoeExpertsParams& params, const float* const* results, int64_t token) {
  T* out = as<T>(params.out) + token * params.hidden;
  const float* weights = params.weights + token * params.top_k;
  for (int64_t i = 0; i < params.hidden; i += kLanes) {
    const int64_t part = params.hidden - i;
    F32 sum{};
    for (int k = 0; k < params.top_k; ++k) {
      sum = fma(broadcast(weights[k]), load_part(results[token * params.top_k + k] + i, part), sum);
    }
    store_part(out + i, sum, part);
  }
}

template <class T>
void run_experts(const MoeExpertsParams& params) {
  const Grouping groups(params);
  const auto num_pairs = static_cast<size_t>(groups.num_pairs);
  const int64_t columns = params.is_gated ? 2 * params.width : params.width;
  const std::unique_ptr<float[]> inner(new float[num_pairs * static_cast<size_t>(columns)]);
  const std::unique_ptr<float[]> outer(new float[num_pairs * static_cast<size_t>(params.hidden)]);
  const std::unique_ptr<const T*[]> tokens(new const T*[num_pairs]);
  const std::unique_ptr<const float*[]> activated(new const float*[num_pairs]);
  const std::unique_ptr<const float*[]> results(new const float*[num_pairs]);
  for (int64_t i = 0; i < groups.num_pairs; ++i) {
    tokens[i] = as<T>(params.x) + groups.pairs[i] / params.top_k * params.x_stride;
    activated[i] = inner.get() + i * columns;
    results[groups.pairs[i]] = outer.get() + i * params.hidden;
  }

  multiply_experts(groups, params.num_experts, as<T>(params.w_in), columns, params.hidden, tokens.get(), inner.get());
  with_activation(params.activation, [&]<Activation kKind>(Kind<kKind>) {
    parallel_for(groups.num_pairs, groups.num_pairs * params.width * 8, [&](int64_t pair) {
      activate_row<kKind>(inner.get() + pair * columns, params.width, params.is_gated);
    });
  });
  multiply_experts(groups, params.num_experts, as<T>(params.w_out), params.hidden, params.width, activated.get(),
                   outer.get());
  parallel_for(params.num_tokens, groups.num_pairs * params.hidden,
               [&](int64_t token) { add_experts<T>(params, results.get(), token); });
}

}  // namespace

void moe_experts(const MoeExpertsParams& params) {
  with_element(params.dtype, [&]<class T>(T) { run_experts<T>(params); });
}

}  // namespace headway::cpu::HEADWAY_SIMD
