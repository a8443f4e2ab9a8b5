// Which blocks of a scan over tiles of channels take which rows and tiles, and the launch; for ssm_warpgroup.cuh's
// blocks and ssm_paired.cuh's.
#pragma once

#include "cuda/common/chained.cuh"
#include "cuda/common/device.h"
#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_warpgroup.cuh"

namespace headway::cuda::warpgroup {

// An item is a row and a tile.
struct TilePlan {
  int num_items;
  int row_tiles;
  int group_tiles;   // of a row, for one group of heads
  bool is_all_rows;  // every row has items, chunks or not; else chunked rows alone, found by rank
};

inline TilePlan plan_tiles(const SsmScanParams& params, const char* op) {
  const int64_t max_query_len = params.max_query_len > 0 ? params.max_query_len : params.num_tokens;
  TilePlan plan{};
  plan.group_tiles = params.num_heads / params.num_groups * params.head_dim / kTileChannels;
  plan.row_tiles = plan.group_tiles * params.num_groups;
  plan.is_all_rows = params.rows.num_rows * max_query_len <= 4 * params.num_tokens;  // few can be short
  const int64_t num_items = (plan.is_all_rows ? params.rows.num_rows : max_chunked_rows(params)) * plan.row_tiles;
  require(num_items <= INT32_MAX / 2, op, "num_rows * num_heads is too large for one launch");
  plan.num_items = static_cast<int>(num_items);
  return plan;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// visit(work) for the block's items, in strides; long rows first. Neighbours share B and C in the cache.
template <typename Visit>
__device__ __forceinline__ void for_each_tile(const SsmScanParams& params, const TilePlan& plan, Visit&& visit) {
  for (int item = static_cast<int>(blockIdx.x); item < plan.num_items; item += static_cast<int>(gridDim.x)) {
    const int rank = item / plan.row_tiles;
    const int row =
        plan.is_all_rows ? chunk::find_row_by_length(params.rows, rank) : chunk::find_chunked_row(params.rows, rank);
    if (row < 0) return;
    const int tile = item % plan.row_tiles;
    visit(Work{params, row, chunk::RowTokens(params.rows, row), tile / plan.group_tiles,
               tile % plan.group_tiles * kTileChannels});
  }
}

// What chunks left of the row: for the heads of the block, their channels in it.
template <int kN>
__device__ __forceinline__ void scan_rest_of_heads(const Work& work, void* shared) {
  const int head_dim = work.params.head_dim;
  const int end = work.first_channel + kTileChannels;
  const int first_head = work.first_head();
  for (int channel = work.first_channel; channel < end;) {
    const int head_end = min(end, (channel / head_dim + 1) * head_dim);
    const int head = first_head + work.local_head(channel);
    chunk::scan_rest<kN>(work.params, work.row, head, channel % head_dim, head_end - channel, shared);
    __syncthreads();
    channel = head_end;
  }
}

// scan_chunks(work) for the block's items, then what chunks leave of their rows. shared: where scan_chunks works.
template <int kN, typename ScanChunks>
__device__ __forceinline__ void scan_tiles(const SsmScanParams& params, const TilePlan& plan, void* shared,
                                           ScanChunks&& scan_chunks) {
  for_each_tile(params, plan, [&](const Work& work) {
    if (work.tokens.num_tokens > 0) scan_chunks(work);
    __syncthreads();  // the row's state is in its slot, and the stages are free
    scan_rest_of_heads<kN>(work, shared);
  });
}

#endif

// resident_blocks: of a multiprocessor. Then, where rows without chunks have no items, a launch for them.
template <typename Kernel, typename... Arguments>
void launch_tiles(Kernel kernel, const TilePlan& plan, int num_threads, int shared_bytes, int resident_blocks,
                  const SsmScanParams& params, cudaStream_t stream, const char* op, const Arguments&... arguments) {
  // Among many decode rows the bound is far too high: blocks that find no row cost more than blocks that take several.
  const bool is_mostly_decode = params.num_tokens < 32 * static_cast<int64_t>(params.rows.num_rows);
  const int resident = device_attribute(cudaDevAttrMultiProcessorCount, op) * resident_blocks;
  const int num_blocks = is_mostly_decode && plan.num_items > resident ? resident : plan.num_items;
  if (num_blocks > 0) {
    launch_chained_wide(op, kernel, dim3(static_cast<unsigned>(num_blocks)), num_threads, shared_bytes, stream, params,
                        arguments..., plan);
  }
  if (!plan.is_all_rows) launch_short_rows_scan(params, stream);
}

}  // namespace headway::cuda::warpgroup
