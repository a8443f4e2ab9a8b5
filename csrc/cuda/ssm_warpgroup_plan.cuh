// The items of ssm_scan_plan.cuh as tiles of channels, and what chunks leave of them; for ssm_warpgroup.cuh's blocks
// and ssm_paired.cuh's.
#pragma once

#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_scan_plan.cuh"
#include "cuda/ssm_warpgroup.cuh"

namespace headway::cuda::warpgroup {

inline int count_row_tiles(const SsmScanParams& params) {
  return params.num_heads * params.head_dim / kTileChannels;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What chunks left of the row: for the heads of the block, their channels in it.
template <int kN>
__device__ __forceinline__ void scan_rest_of_heads(const Work& work, void* shared) {
  const int head_dim = work.params.head_dim;
  const int end = work.first_channel + kTileChannels;
  const int first_head = work.first_head();
  for (int channel = work.first_channel; channel < end;) {
    const int head_end = min(end, (channel / head_dim + 1) * head_dim);
    const int head = first_head + work.local_head(channel);
    chunk::scan_rest<kN>(work.params, work.item.row, head, channel % head_dim, head_end - channel, shared);
    __syncthreads();
    channel = head_end;
  }
}

__device__ __forceinline__ Work work_of(const SsmScanParams& params, const chunk::ScanPlan& plan,
                                        const chunk::ScanItem& item) {
  const int group_tiles = plan.row_items / params.num_groups;
  return {params, item, item.index / group_tiles, item.index % group_tiles * kTileChannels};
}

// visit(work) for the block's items that have chunks.
template <typename Visit>
__device__ __forceinline__ void for_each_tile(const SsmScanParams& params, const chunk::ScanPlan& plan, Visit&& visit) {
  chunk::for_each_item(params.rows, plan, [&](const chunk::ScanItem& item) {
    if (item.has_chunks()) visit(work_of(params, plan, item));
  });
}

// What chunks leave of the block's rows. shared: where the stages were.
template <int kN>
__device__ __forceinline__ void scan_rests(const SsmScanParams& params, const chunk::ScanPlan& plan, void* shared) {
  __syncthreads();  // the rows' states are in their slots, and the stages are free
  chunk::for_each_item(params.rows, plan, [&](const chunk::ScanItem& item) {
    if (item.has_rest() && item.is_last) scan_rest_of_heads<kN>(work_of(params, plan, item), shared);
  });
}

#endif

}  // namespace headway::cuda::warpgroup
