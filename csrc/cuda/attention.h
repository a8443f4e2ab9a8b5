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

// Rows of at most this many queries go to a decode kernel, others to one for prompts; of either there is one on
// warpgroup products, for the shapes it takes, and one for all else. What row goes where depends on shapes, dtype and
// device alone. Each kernel's sums follow a tree that depends on absolute positions alone, so a query's result is the
// same bits however its prompt was cut and whoever shares the batch, as long as the same kernel takes it. The trees
// differ: decode must spread one query over the chip.
inline constexpr int kMaxDecodeQueries = 8;

// Keys of a leaf (what one warp takes at a time) and a step (a block's warps together) of the decode kernel's sums, and
// steps of a span; see attention_decode.cuh.
inline constexpr int kDecodeWarps = 4;
inline constexpr int kLeafKeys = 64;
inline constexpr int kStepKeys = kDecodeWarps * kLeafKeys;
inline constexpr int kSpanSteps = 8;

// Packed rows (queries x heads of a group) of one warp's product.
inline constexpr int kFragmentRows = 16;

// The same of the decode kernel on warpgroup products: keys of a step, packed rows of a warpgroup, warpgroups at most.
// Heads of 64 leave a tile too little to do: there the other kernel is faster.
inline constexpr int kStreamDim = 128;
inline constexpr int kStreamStepKeys = 128;
inline constexpr int kStreamRows = 64;
inline constexpr int kMaxStreamGroups = 2;

inline constexpr float kLog2E = 1.44269504f;

inline constexpr int kMaxAttentionRows = 8192;  // rows of a step: their prefix sums live in shared memory

// Blocks of the persistent grids: enough for every multiprocessor of any device this is built for.
inline constexpr int kMaxMultiprocessors = 144;
inline constexpr int kAttentionBlocks = 2 * kMaxMultiprocessors;
inline constexpr int kAttentionWarps = 4;
inline constexpr int kAttentionThreads = kAttentionWarps * 32;
inline constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;

inline int padded_head_dim(int head_dim) {
  for (const int dim : {32, 64, 80, 96, 128, 192, 256}) {
    if (head_dim <= dim) return dim;
  }
  return 0;
}

// The decode kernel is compiled for these head dims; others are padded. Channels beyond kMaxSumChannels are summed by a
// block of their own, which scores the keys again: more would not fit the registers.
inline constexpr int kMaxSumChannels = 128;
constexpr int decode_dim(int head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}
constexpr int num_channel_parts(int head_dim) {
  return head_dim <= kMaxSumChannels ? 1 : 2;
}
constexpr int decode_blocks_per_multiprocessor(int decode_dim) {
  return decode_dim == 64 ? 4 : 2;
}

// How a decode kernel cuts its work, and its workspace.
struct DecodePlan {
  int step_keys;
  int fragment_rows;  // packed rows of a pass over the keys
  int num_parts;  // passes over the keys: fragments, times parts of the channels
  int64_t max_steps;  // of a row and key head
  int64_t partial_rows = 0;  // packed rows of a partial result
  int64_t partial_bytes = 0;  // of one partial result
  int64_t max_partials = 0;  // that fit; where they do not do, a block takes whole rows

  int64_t workspace_bytes() const { return max_partials * partial_bytes; }
};

inline int64_t max_packed_rows(const PagedAttentionParams& params) {
  return int64_t{std::min(params.max_query_len, kMaxDecodeQueries)} * (params.num_heads / params.num_kv_heads);
}

inline DecodePlan plan_decode(const PagedAttentionParams& params, int step_keys, int fragment_rows,
                              int blocks_per_multiprocessor) {
  const int64_t packed = max_packed_rows(params);
  const auto fragments = static_cast<int>((packed + fragment_rows - 1) / fragment_rows);
  DecodePlan plan{.step_keys = step_keys,
                  .fragment_rows = fragment_rows,
                  .num_parts = fragments * num_channel_parts(params.head_dim),
                  .max_steps = std::max<int64_t>(1, (int64_t{params.max_kv_len} + step_keys - 1) / step_keys)};
  if (plan.max_steps == 1) return plan;
  const int64_t lists = int64_t{params.rows.num_rows} * params.num_kv_heads * plan.num_parts;
  plan.partial_rows = std::min<int64_t>(fragment_rows, packed);
  plan.partial_bytes = (plan.partial_rows * (std::min(params.head_dim, kMaxSumChannels) + 2) * 4 + 15) / 16 * 16;
  const int64_t span_partials = lists * plan.max_steps / kSpanSteps + lists;
  const int64_t max_blocks = blocks_per_multiprocessor * kMaxMultiprocessors;
  const int64_t step_partials = std::min(max_blocks, lists * plan.max_steps) * kSpanSteps;
  plan.max_partials = std::min(span_partials + step_partials, kMaxPartialBytes / plan.partial_bytes);
  return plan;
}

// Of the kernel for any shape.
inline DecodePlan plan_decode(const PagedAttentionParams& params) {
  return plan_decode(params, kStepKeys, kFragmentRows, decode_blocks_per_multiprocessor(decode_dim(params.head_dim)));
}

// Of the kernel on warpgroup products: with few packed rows each warpgroup counts as a block.
inline int num_stream_groups(const PagedAttentionParams& params) {
  return max_packed_rows(params) <= kStreamRows ? 1 : kMaxStreamGroups;
}
inline DecodePlan plan_stream(const PagedAttentionParams& params) {
  const int num_groups = num_stream_groups(params);
  return plan_decode(params, kStreamStepKeys, num_groups * kStreamRows, kMaxStreamGroups / num_groups);
}

void launch_generic_attention(const PagedAttentionParams& params, cudaStream_t stream);
void launch_decode_attention(const PagedAttentionParams& params, cudaStream_t stream);
void launch_tiled_attention(const PagedAttentionParams& params, cudaStream_t stream);

// The kernels on warpgroup products (sm_90a), and whether they take these shapes on the current device; of decode only
// heads of kStreamDim. counter: one number of workspace.
bool can_attend_warpgroups(const PagedAttentionParams& params);
void launch_stream_attention(const PagedAttentionParams& params, cudaStream_t stream);
void launch_warpgroup_attention(const PagedAttentionParams& params, unsigned* counter, cudaStream_t stream);

}  // namespace headway::cuda
