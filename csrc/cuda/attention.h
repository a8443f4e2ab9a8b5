// What the attention kernels share on the host side: which kernel takes which row, and the workspace's layout.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "params/attention.h"

namespace headway::cuda {

inline constexpr char kAttentionOp[] = "paged_attention";

// The tree of a query's sum over its keys: tiles of 64 keys are added in order within a split of 512, splits are merged
// in order, both counted from position 0. Both tensor core kernels follow it, so a query's result is the same bits
// whichever kernel takes it, however its prompt was cut into steps, and whoever shares the batch.
inline constexpr int kTileKeys = 64;
inline constexpr int kSplitKeys = 512;
inline constexpr int kSplitTiles = kSplitKeys / kTileKeys;

// Rows of at most this many queries go to the split kernel, others to the tiled one.
inline constexpr int kMaxSplitQueries = 8;

// Packed rows (queries x heads of a group) of one warp's product.
inline constexpr int kFragmentRows = 16;

inline constexpr float kLog2E = 1.44269504f;

inline constexpr int kMaxSplitRows = 8192;  // rows of a step: their prefix sums live in shared memory

// Bytes of the workspace's parts, in their order.
struct AttentionWorkspace {
  int64_t total_bytes;    // running sums of every resident thread
  int64_t partial_rows;   // rows of a split's partial result: kFragmentRows or fewer
  int64_t partial_bytes;  // of one split
  int64_t max_partials;   // that fit; with more, a warp takes all splits of its rows itself
};

// Blocks of the persistent grids: enough for every multiprocessor of any device this is built for.
inline constexpr int kAttentionBlocks = 2 * 144;
inline constexpr int kAttentionWarps = 4;
inline constexpr int kAttentionThreads = kAttentionWarps * 32;
inline constexpr int64_t kMaxPartialBytes = int64_t{128} << 20;

inline int padded_head_dim(int head_dim) {
  for (const int dim : {32, 64, 80, 96, 128, 192, 256}) {
    if (head_dim <= dim) return dim;
  }
  return 0;
}

// fp32 words a thread keeps of a running sum: its accumulator, then the maxima and sums of its rows.
inline int64_t total_words(int padded_dim) {
  return padded_dim + 8;
}

inline AttentionWorkspace plan_workspace(const PagedAttentionParams& params) {
  const int group = params.num_heads / params.num_kv_heads;
  const int64_t max_splits = (static_cast<int64_t>(params.max_kv_len) + kSplitKeys - 1) / kSplitKeys;
  const int64_t queries = std::min(params.max_query_len, kMaxSplitQueries);
  const int64_t fragments = (queries * group + kFragmentRows - 1) / kFragmentRows;
  AttentionWorkspace plan{};
  if (max_splits <= 1) return plan;
  plan.total_bytes = kAttentionBlocks * kAttentionThreads * total_words(padded_head_dim(params.head_dim)) * 4;
  plan.partial_rows = std::min<int64_t>(kFragmentRows, queries * group);
  plan.partial_bytes = plan.partial_rows * (params.head_dim + 2) * 4;
  plan.max_partials = std::min(params.rows.num_rows * max_splits * fragments * params.num_kv_heads,
                               kMaxPartialBytes / plan.partial_bytes);
  return plan;
}

void launch_generic_attention(const PagedAttentionParams& params, cudaStream_t stream);
void launch_split_attention(const PagedAttentionParams& params, const AttentionWorkspace& plan, cudaStream_t stream);
void launch_tiled_attention(const PagedAttentionParams& params, cudaStream_t stream);

}  // namespace headway::cuda
