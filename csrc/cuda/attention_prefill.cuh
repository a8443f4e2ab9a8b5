// What the two kernels for rows of many queries share: the packed rows (queries x heads that share a key head) that a
// block of threads takes at a time.
#pragma once

#include "cuda/attention_tile.cuh"

namespace headway::cuda {

struct PrefillParams {
  PagedAttentionParams attention;
  int group;  // query heads a key head
  float log2_scale;
};

// Blocks of kRows packed rows in row r, per key head.
template <int kRows>
__device__ __forceinline__ int num_query_blocks(const PrefillParams& params, int r) {
  const int num_queries = params.attention.rows.query_start[r + 1] - params.attention.rows.query_start[r];
  if (num_queries <= kMaxDecodeQueries) return 0;
  return (num_queries * params.group + kRows - 1) / kRows;
}

// At most as many as there are, all rows together; for the host.
template <int kRows>
int64_t max_query_blocks(const PrefillParams& params) {
  return params.attention.num_tokens * params.group / kRows + params.attention.rows.num_rows;
}

// A block of packed rows of one key head: packed index = query * group + head of the group.
struct QueryBlock {
  QueryRow row;
  int kv_head;
  int first;  // packed index of the first
  int num_packed;  // of the whole row
  int num_keys;  // that the last of them sees
};

// The position up to which a packed row sees keys.
__device__ __forceinline__ int keys_seen(const PrefillParams& params, const QueryBlock& block, int packed) {
  return block.row.first_position + packed / params.group + 1;
}

// Element offset of a packed row in a [T, Hq, D] tensor with tokens `stride` apart.
__device__ __forceinline__ int64_t packed_offset(const PrefillParams& params, const QueryBlock& block, int packed,
                                                 int64_t stride) {
  const int head = block.kv_head * params.group + packed % params.group;
  return (block.row.first_token + packed / params.group) * stride +
         static_cast<int64_t>(head) * params.attention.head_dim;
}

// All blocks of kRows packed rows of a launch. prefix: of the rows' num_query_blocks.
template <int kRows>
struct QueryBlocks {
  const PrefillParams& params;
  const int32_t* prefix;

  __device__ int64_t count() const {
    return static_cast<int64_t>(prefix[params.attention.rows.num_rows]) * params.attention.num_kv_heads;
  }

  // Late queries see the most keys: they come first. All lanes of a warp call it.
  __device__ QueryBlock at(int64_t index) const {
    const int num_kv_heads = params.attention.num_kv_heads;
    const int64_t place = count() - 1 - index;
    const int unit = static_cast<int>(place / num_kv_heads);
    const int r = find_row(prefix, params.attention.rows.num_rows, unit);
    QueryBlock block;
    block.row = query_row(params.attention, r);
    block.kv_head = static_cast<int>(place % num_kv_heads);
    block.first = (unit - prefix[r]) * kRows;
    block.num_packed = block.row.num_queries * params.group;
    block.num_keys = keys_seen(params, block, min(block.first + kRows, block.num_packed) - 1);
    return block;
  }
};

}  // namespace headway::cuda
