// What the attention kernels share on the host side: which kernel takes which row, and the workspace's layout.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "params/attention.h"

namespace headway::cuda {

inline constexpr char kAttentionOp[] = "paged_attention";

// Keys of one tile of the tiled kernel.
inline constexpr int kTileKeys = 64;

// Rows of at most this many queries go to the decode kernel, others to the tiled one. Each kernel's sums follow a tree
// that depends on absolute positions alone, so a query's result is the same bits however its prompt was cut and whoever
// shares the batch, as long as the same kernel takes it. The trees differ: decode must spread one query over the chip.
inline constexpr int kMaxDecodeQueries = 8;

// Keys that one decode step multiplies at once, and steps of a span (see attention_decode.cuh).
constexpr int decode_step_keys(int padded_dim) {
  return padded_dim <= 128 ? 128 : 64;
}
inline constexpr int kSpanSteps = 8;
inline constexpr int kItemsPerBlock = 3;  // with fewer spans than this a block, steps balance better

// Packed rows (queries x heads of a group) of one warp's product.
inline constexpr int kFragmentRows = 16;

inline constexpr float kLog2E = 1.44269504f;

inline constexpr int kMaxAttentionRows = 8192;  // rows of a step: their prefix sums live in shared memory

// Bytes of the decode kernel's workspace, in the order of its parts.
struct AttentionWorkspace {
  int64_t total_bytes;    // running sums of every resident thread
  int64_t partial_rows;   // packed rows of a partial result
  int64_t partial_bytes;  // of one partial result
  int64_t max_partials;   // that fit; with more, a block takes all keys of its rows itself
};

// Blocks of the persistent grids: enough for every multiprocessor of any device this is built for.
inline constexpr int kAttentionBlocks = 2 * 144;
inline constexpr int kAttentionWarps = 4;
inline constexpr int kAttentionThreads = kAttentionWarps * 32;
inline constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;

inline int padded_head_dim(int head_dim) {
  for (const int dim : {32, 64, 80, 96, 128, 192, 256}) {
    if (head_dim <= dim) return dim;
  }
  return 0;
}

// Fragments of packed rows that one item of the decode kernel takes, all from one pass over the keys.
inline int decode_fragments(const PagedAttentionParams& params) {
  const int queries = std::min(params.max_query_len, kMaxDecodeQueries);
  const int fragments = (queries * (params.num_heads / params.num_kv_heads) + kFragmentRows - 1) / kFragmentRows;
  const int most = padded_head_dim(params.head_dim) <= 128 ? 4 : 2;
  return fragments == 1 ? 1 : fragments == 2 ? 2 : most;
}

inline AttentionWorkspace plan_workspace(const PagedAttentionParams& params) {
  const int padded_dim = padded_head_dim(params.head_dim);
  const int step_keys = decode_step_keys(padded_dim);
  AttentionWorkspace plan{};
  if (params.max_kv_len <= step_keys) return plan;
  const int64_t queries = std::min(params.max_query_len, kMaxDecodeQueries);
  const int64_t packed = queries * (params.num_heads / params.num_kv_heads);
  const int64_t group_rows = decode_fragments(params) * kFragmentRows;
  const int64_t units = params.rows.num_rows * params.num_kv_heads * ((packed + group_rows - 1) / group_rows);
  const int64_t max_steps = (static_cast<int64_t>(params.max_kv_len) + step_keys - 1) / step_keys;
  const int64_t max_spans = (max_steps + kSpanSteps - 1) / kSpanSteps;
  constexpr int64_t kMostStepItems = int64_t{kItemsPerBlock} * kSpanSteps * kAttentionBlocks;
  plan.total_bytes = int64_t{kAttentionBlocks} * kAttentionThreads * (padded_dim + 8) * 4;
  plan.partial_rows = std::min(group_rows, packed);
  plan.partial_bytes = plan.partial_rows * (params.head_dim + 2) * 4;
  plan.max_partials = std::min(std::max(std::min(units * max_steps, kMostStepItems), units * max_spans),
                               kMaxPartialBytes / plan.partial_bytes);
  return plan;
}

void launch_generic_attention(const PagedAttentionParams& params, cudaStream_t stream);
void launch_decode_attention(const PagedAttentionParams& params, const AttentionWorkspace& plan, cudaStream_t stream);
void launch_tiled_attention(const PagedAttentionParams& params, cudaStream_t stream);

}  // namespace headway::cuda
