#pragma once

#include "params/common.h"

namespace headway {

// Rotates the first rotary_dim channels of every head of q and k in place. NeoX layout: channel i pairs with
// i + rotary_dim / 2.
struct RotaryParams {
  int64_t num_tokens;         // T
  int32_t num_heads;          // Hq
  int32_t num_kv_heads;       // Hkv
  int32_t head_dim;           // D
  int32_t rotary_dim;         // even, <= D
  void* q;                    // [T, Hq, D] dtype, tokens q_stride apart
  int64_t q_stride;
  void* k;                    // [T, Hkv, D] dtype, tokens k_stride apart
  int64_t k_stride;
  const int32_t* positions;   // [T]
  const float* cos_sin;       // [max_position, rotary_dim]: cosines of the rotary_dim / 2 angles, then their sines
  DType dtype;
};

// Where each token's keys and values live: position p of row r is in block block_table[r][p / S] at p % S.
struct KvCache {
  void* keys;                 // [num_blocks, S, Hkv, D] dtype
  void* values;               // [num_blocks, S, Hkv, D] dtype
  int64_t block_stride;       // elements between blocks
  int32_t block_size;         // S tokens
  const int32_t* block_table; // [max_rows, max_blocks_per_row]
  int64_t table_stride;       // = max_blocks_per_row
};

// Stores a step's new keys and values in their blocks.
struct KvWriteParams {
  int64_t num_tokens;         // T
  int32_t num_kv_heads;       // Hkv
  int32_t head_dim;           // D
  const void* k;              // [T, Hkv, D] dtype, tokens k_stride apart
  int64_t k_stride;
  const void* v;              // [T, Hkv, D] dtype, tokens v_stride apart
  int64_t v_stride;
  const int32_t* positions;   // [T]
  const int32_t* token_rows;  // [T] index into rows
  const int32_t* rows;        // [R] row ids
  KvCache cache;
  DType dtype;
};

// Causal attention of ragged query rows over their paged keys and values (this step's included, already written).
// Query i of row r sees positions 0 .. row_start[r] + i.
struct PagedAttentionParams {
  RowList rows;
  int64_t num_tokens;         // T
  int32_t max_query_len;      // host bound, for the grid
  int32_t max_kv_len;         // host bound, for the split
  int32_t num_heads;          // Hq
  int32_t num_kv_heads;       // Hkv; divides Hq
  int32_t head_dim;           // D
  const void* q;              // [T, Hq, D] dtype, tokens q_stride apart
  int64_t q_stride;
  const int32_t* row_ids;     // [R]
  KvCache cache;
  float scale;
  void* workspace;            // split-KV partial sums on a GPU; may be null
  int64_t workspace_bytes;
  void* out;                  // [T, Hq, D] dtype, contiguous
  DType dtype;
};

}  // namespace headway
