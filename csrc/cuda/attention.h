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

// Rows of at most this many queries go to the decode kernel, others to the warpgroup kernel where it takes the shape,
// or else to the tiled one: what row goes where depends on shapes, dtype and device alone. Each kernel's sums follow a
// tree that depends on absolute positions alone, so a query's result is the same bits however its prompt was cut and
// whoever shares the batch, as long as the same kernel takes it. The trees differ: decode must spread one query over
// the chip.
inline constexpr int kMaxDecodeQueries = 8;

// Keys of a leaf (what one warp takes at a time), a step (a block's warps together) and a span of the decode kernel's
// sums; see attention_decode.cuh.
inline constexpr int kDecodeWarps = 4;
inline constexpr int kLeafKeys = 64;
inline constexpr int kStepKeys = kDecodeWarps * kLeafKeys;
inline constexpr int kSpanSteps = 8;

// Packed rows (queries x heads of a group) of one warp's product.
inline constexpr int kFragmentRows = 16;

inline constexpr float kLog2E = 1.44269504f;

inline constexpr int kMaxAttentionRows = 8192;  // rows of a step: their prefix sums live in shared memory

// The decode kernel's workspace: partial results.
struct AttentionWorkspace {
  int64_t partial_rows;   // packed rows of a partial result
  int64_t partial_bytes;  // of one partial result
  int64_t max_partials;   // that fit; with more, a block takes whole rows
};

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

// Passes over the keys: fragments of packed rows, times parts of the channels.
inline int num_decode_parts(const PagedAttentionParams& params) {
  const int queries = std::min(params.max_query_len, kMaxDecodeQueries);
  const int packed = queries * (params.num_heads / params.num_kv_heads);
  return (packed + kFragmentRows - 1) / kFragmentRows * num_channel_parts(params.head_dim);
}

inline AttentionWorkspace plan_workspace(const PagedAttentionParams& params) {
  AttentionWorkspace plan{};
  if (params.max_kv_len <= kStepKeys) return plan;
  const int64_t queries = std::min(params.max_query_len, kMaxDecodeQueries);
  const int64_t packed = queries * (params.num_heads / params.num_kv_heads);
  const int64_t max_steps = (static_cast<int64_t>(params.max_kv_len) + kStepKeys - 1) / kStepKeys;
  const int64_t lists = int64_t{params.rows.num_rows} * params.num_kv_heads * num_decode_parts(params);
  const int64_t max_blocks = decode_blocks_per_multiprocessor(decode_dim(params.head_dim)) * kMaxMultiprocessors;
  plan.partial_rows = std::min<int64_t>(kFragmentRows, packed);
  plan.partial_bytes = (plan.partial_rows * (std::min(params.head_dim, kMaxSumChannels) + 2) * 4 + 15) / 16 * 16;
  const int64_t span_partials = lists * max_steps / kSpanSteps + lists;
  const int64_t step_partials = std::min(max_blocks, lists * max_steps) * kSpanSteps;
  plan.max_partials = std::min(span_partials + step_partials, kMaxPartialBytes / plan.partial_bytes);
  return plan;
}

void launch_generic_attention(const PagedAttentionParams& params, cudaStream_t stream);
void launch_decode_attention(const PagedAttentionParams& params, const AttentionWorkspace& plan, cudaStream_t stream);
void launch_tiled_attention(const PagedAttentionParams& params, cudaStream_t stream);

// The kernel for rows of many queries on sm_90a, and whether it takes these shapes on the current device. counter: one
// number of workspace.
bool can_attend_warpgroups(const PagedAttentionParams& params);
void launch_warpgroup_attention(const PagedAttentionParams& params, unsigned* counter, cudaStream_t stream);

}  // namespace headway::cuda
