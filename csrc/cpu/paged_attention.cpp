// Causal attention over paged keys and values with an online softmax (arXiv 1805.02867, 2205.14135).
//
// Keys are taken in tiles at absolute positions 0, kTile, 2 kTile, ...: the order of additions of a query depends on
// its position alone, so neither chunking nor batching changes a bit. A work item is (row, block of queries, KV head);
// it shows each tile of keys and values, widened to fp32 where it is not, to all its queries and query heads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "cpu/element.h"
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/variants.h"

namespace headway::cpu::HEADWAY_SIMD {
namespace {

constexpr int kTile = 32;        // keys
constexpr int kMaxQueries = 16;  // of a work item
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Item {
  int64_t row;
  int64_t first_query;  // within the row
  int kv_head;
};

// Sizes that every function below needs.
struct Shape {
  int group;       // query heads a KV head
  int padded_dim;  // D rounded up to whole vectors
};

// Running softmax of one query and head: weights are exp(score - peak).
struct Running {
  float peak = kMinusInfinity;
  float total = 0.0f;
};

constexpr int kGroups = kTile / kLanes;  // of kLanes keys

// Keys and values of one tile in fp32: where they lie, D padded with zeros.
struct KeyTile {
  const float* keys[kGroups];    // [kLanes, D] each, keys `stride` apart
  const float* values[kGroups];
  int64_t stride;
  float* widened_keys;           // [kTile, padded_dim] scratch, where the cache itself does not serve
  float* widened_values;
};

// Position's place in the cache, in elements.
int64_t cache_offset(const PagedAttentionParams& params, const Item& item, int position) {
  const KvCache& cache = params.cache;
  const int32_t* blocks = cache.block_table + params.row_ids[item.row] * cache.table_stride;
  const int64_t token_size = int64_t{params.num_kv_heads} * params.head_dim;
  return blocks[position / cache.block_size] * cache.block_stride + position % cache.block_size * token_size +
         int64_t{item.kv_head} * params.head_dim;
}

// fp32 whole vectors whose groups of keys lie within one block are read where they are.
template <class T>
bool is_read_in_place(const PagedAttentionParams& params, const Shape& shape) {
  return sizeof(T) == sizeof(float) && params.head_dim == shape.padded_dim && params.cache.block_size % kLanes == 0;
}

void point_at_keys(const PagedAttentionParams& params, const Item& item, int position, int count, KeyTile& tile) {
  tile.stride = int64_t{params.num_kv_heads} * params.head_dim;
  for (int group = 0; group * kLanes < count; ++group) {
    const int64_t offset = cache_offset(params, item, position + group * kLanes);
    tile.keys[group] = as<float>(static_cast<const void*>(params.cache.keys)) + offset;
    tile.values[group] = as<float>(static_cast<const void*>(params.cache.values)) + offset;
  }
}

template <class T>
void widen_keys(const PagedAttentionParams& params, const Item& item, const Shape& shape, int position, int count,
                KeyTile& tile) {
  for (int i = 0; i < count; ++i) {
    const int64_t source = cache_offset(params, item, position + i);
    for (int d = 0; d < params.head_dim; d += kLanes) {
      const int part = params.head_dim - d;
      store(tile.widened_keys + i * shape.padded_dim + d, load_part(as<T>(params.cache.keys) + source + d, part));
      store(tile.widened_values + i * shape.padded_dim + d, load_part(as<T>(params.cache.values) + source + d, part));
    }
  }
  tile.stride = shape.padded_dim;
  for (int group = 0; group < kGroups; ++group) {
    tile.keys[group] = tile.widened_keys + group * kLanes * shape.padded_dim;
    tile.values[group] = tile.widened_values + group * kLanes * shape.padded_dim;
  }
}

// scores[i] = query . key i for i < count, -inf up to kTile. kLanes keys at a time, one sum a register; those beyond
// count are whatever memory holds, and their sums are dropped.
void score_keys(const float* query, const KeyTile& tile, int count, int padded_dim, float* scores) {
  for (int i = 0; i < count; i += kLanes) {
    const float* keys = tile.keys[i / kLanes];
    F32 dots[kLanes] = {};
    for (int d = 0; d < padded_dim; d += kLanes) {
      const F32 part = load(query + d);
#pragma GCC unroll 16
      for (int key = 0; key < kLanes; ++key) dots[key] = fma(part, load(keys + key * tile.stride + d), dots[key]);
    }
    store(scores + i, reduce_add_each(dots));
  }
  for (int i = count; i < kTile; ++i) scores[i] = kMinusInfinity;
}

// sums = sums * fade + weighted values, kVectors vectors of channels at a time: as many additions in flight.
template <int kVectors>
void add_values(const float* weights, const KeyTile& tile, int count, int channel, F32 fade, float* sums) {
  F32 sum[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sum[v] = load(sums + channel + v * kLanes) * fade;
  for (int i = 0; i < count; ++i) {
    const F32 weight = broadcast(weights[i]);
    const float* value = tile.values[i / kLanes] + i % kLanes * tile.stride + channel;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v] = fma(weight, load(value + v * kLanes), sum[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store(sums + channel + v * kLanes, sum[v]);
}

// Adds the tile's first count keys to one query's running sums; sums [padded_dim] is the weighted sum of values.
void attend(const float* query, const KeyTile& tile, int count, int padded_dim, Running& running, float* sums) {
  alignas(64) float weights[kTile];
  score_keys(query, tile, count, padded_dim, weights);
  F32 highest = load(weights);
  for (int i = kLanes; i < kTile; i += kLanes) highest = max(highest, load(weights + i));
  const float peak = std::max(running.peak, reduce_max(highest));
  // While nothing finite was seen, differences of infinities must not become NaN.
  const F32 base = broadcast(peak == kMinusInfinity ? 0.0f : peak);
  const F32 fade = exp(broadcast(running.peak) - base);
  F32 total{};
  for (int i = 0; i < kTile; i += kLanes) {
    const F32 weight = exp(load(weights + i) - base);
    store(weights + i, weight);
    total += weight;
  }
  running.total = running.total * fade[0] + reduce_add(total);
  running.peak = peak;
  int d = 0;
  for (; d + 8 * kLanes <= padded_dim; d += 8 * kLanes) add_values<8>(weights, tile, count, d, fade, sums);
  for (; d + 4 * kLanes <= padded_dim; d += 4 * kLanes) add_values<4>(weights, tile, count, d, fade, sums);
  for (; d < padded_dim; d += kLanes) add_values<1>(weights, tile, count, d, fade, sums);
}

// Scratch of one work item.
struct Scratch {
  explicit Scratch(const Shape& shape)
      : memory(new float[static_cast<size_t>(shape.padded_dim) * (2 * kTile + 2 * kMaxQueries * shape.group)]) {
    const int64_t dim = shape.padded_dim;
    tile.widened_keys = memory.get();
    tile.widened_values = tile.widened_keys + kTile * dim;
    queries = tile.widened_values + kTile * dim;
    sums = queries + kMaxQueries * shape.group * dim;
  }
  std::unique_ptr<float[]> memory;
  KeyTile tile{};
  float* queries;  // [queries, group, padded_dim], scaled
  float* sums;     // [queries, group, padded_dim]
};

template <class T>
void attend_item(const PagedAttentionParams& params, const Shape& shape, const Item& item) {
  const int64_t row_begin = params.rows.query_start[item.row];
  const int64_t num_queries = params.rows.query_start[item.row + 1] - row_begin;
  if (item.first_query >= num_queries) return;
  const int queries = static_cast<int>(std::min<int64_t>(kMaxQueries, num_queries - item.first_query));
  const int64_t token = row_begin + item.first_query;
  const int position = params.rows.row_start[item.row] + static_cast<int>(item.first_query);
  const int first_head = item.kv_head * shape.group;
  Scratch scratch(shape);

  // Queries in fp32, scaled once.
  const auto at = [&](float* base, int query, int head) {
    return base + (int64_t{query} * shape.group + head) * shape.padded_dim;
  };
  for (int query = 0; query < queries; ++query) {
    for (int head = 0; head < shape.group; ++head) {
      const T* source = as<T>(params.q) + (token + query) * params.q_stride + (first_head + head) * params.head_dim;
      for (int d = 0; d < shape.padded_dim; d += kLanes) {
        store(at(scratch.queries, query, head) + d, load_part(source + d, params.head_dim - d) * params.scale);
        store(at(scratch.sums, query, head) + d, F32{});
      }
    }
  }

  // Tiles of keys in absolute order; a query sees keys up to its own position.
  std::unique_ptr<Running[]> running(new Running[static_cast<size_t>(queries * shape.group)]);
  const int num_keys = position + queries;
  const bool is_in_place = is_read_in_place<T>(params, shape);
  for (int begin = 0; begin < num_keys; begin += kTile) {
    const int count = std::min(kTile, num_keys - begin);
    if (is_in_place) {
      point_at_keys(params, item, begin, count, scratch.tile);
    } else {
      widen_keys<T>(params, item, shape, begin, count, scratch.tile);
    }
    for (int query = std::max(0, begin - position); query < queries; ++query) {
      const int visible = std::min(kTile, position + query + 1 - begin);
      for (int head = 0; head < shape.group; ++head) {
        attend(at(scratch.queries, query, head), scratch.tile, visible, shape.padded_dim,
               running[query * shape.group + head], at(scratch.sums, query, head));
      }
    }
  }

  // Weighted means out.
  for (int query = 0; query < queries; ++query) {
    for (int head = 0; head < shape.group; ++head) {
      const float norm = 1.0f / running[query * shape.group + head].total;
      T* out = as<T>(params.out) + ((token + query) * params.num_heads + first_head + head) * params.head_dim;
      for (int d = 0; d < params.head_dim; d += kLanes) {
        store_part(out + d, load(at(scratch.sums, query, head) + d) * norm, params.head_dim - d);
      }
    }
  }
}

}  // namespace

void paged_attention(const PagedAttentionParams& params) {
  const Shape shape{params.num_heads / params.num_kv_heads, (params.head_dim + kLanes - 1) / kLanes * kLanes};
  const int64_t blocks = (std::max(params.max_query_len, 1) + kMaxQueries - 1) / kMaxQueries;
  const int64_t cost = params.num_tokens * params.num_heads * params.head_dim * std::max(params.max_kv_len, 1) / 2;
  with_element(params.dtype, [&]<class T>(T) {
    parallel_for(params.rows.num_rows * blocks * params.num_kv_heads, cost, [&](int64_t index) {
      const int64_t block = index / params.num_kv_heads;
      attend_item<T>(params, shape,
                     {block / blocks, block % blocks * kMaxQueries, static_cast<int>(index % params.num_kv_heads)});
    });
  });
}

}  // namespace headway::cpu::HEADWAY_SIMD
