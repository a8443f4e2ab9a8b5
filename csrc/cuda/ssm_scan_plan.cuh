// How the blocks of a scan on warpgroup products share out rows, heads and, where these are few, a row's chunks.
//
// An item is a row and some channels of a head. A block takes items one after the other. Where blocks outnumber items,
// a cluster takes one, each of its blocks a segment of the row's chunks: it makes the segment's outputs, and gets the
// state that the segment begins with by running the steps of the state, and nothing else, over all chunks before it.
// The steps are the same, so no bit depends on the segments.
#pragma once

#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/device.h"
#include "cuda/ssm_chunk_rows.cuh"

namespace headway::cuda::chunk {

inline constexpr int kMaxSegments = 4;
inline constexpr int kWholeRow = 1024;  // what segments count a row's chunks in
// Of a chunk of which only the state's step runs, where one with outputs costs 1; measured on an H200.
inline constexpr float kStepCost = 0.45f;

struct ScanPlan {
  int num_items;
  int num_clusters;  // of a block for each segment
  int row_items;
  int num_segments;
  int segment_begin[kMaxSegments + 1];  // of kWholeRow
  bool is_all_rows;  // every row has items, chunks or not; else chunked rows alone, found by rank
};

// What a block does at a time.
struct ScanItem {
  int row;
  int index;  // within the row
  RowTokens tokens;
  int num_rest;  // tokens of the row behind them
  int first_output;  // chunks before it only move the state
  int end;           // of the chunks
  bool is_last;      // of the row's segments: ends with the row's state

  __device__ __forceinline__ bool has_chunks() const { return tokens.num_tokens > 0; }
  __device__ __forceinline__ bool has_rest() const { return num_rest > 0 || !has_chunks(); }
};

// visit(item) for the items of this block, in strides that turn at their ends: rows come by length, so blocks end
// together. Neighbours share B and C in the cache.
template <typename Visit>
__device__ __forceinline__ void for_each_item(const RowList& rows, const ScanPlan& plan, Visit&& visit) {
  const int stride = static_cast<int>(gridDim.x) / plan.num_segments;
  const int block = static_cast<int>(blockIdx.x) / plan.num_segments;
  const int segment = static_cast<int>(blockIdx.x) % plan.num_segments;
  const bool is_last = segment == plan.num_segments - 1;
  for (int turn = 0; turn * stride < plan.num_items; ++turn) {
    const int item = turn * stride + (turn % 2 == 0 ? block : stride - 1 - block);
    if (item >= plan.num_items) return;
    const int rank = item / plan.row_items;
    const int row = plan.is_all_rows ? find_row_by_length(rows, rank) : find_chunked_row(rows, rank);
    if (row < 0) return;
    const RowTokens tokens(rows, row);
    const int num_rest = rows.query_start[row + 1] - tokens.begin - tokens.num_tokens;
    const int num_chunks = tokens.num_chunks();
    const int first = num_chunks * plan.segment_begin[segment] / kWholeRow;
    const int end = num_chunks * plan.segment_begin[segment + 1] / kWholeRow;
    const bool is_empty = first == end && !is_last;
    visit(ScanItem{row, item % plan.row_items, tokens, num_rest, is_empty ? 0 : first, is_empty ? 0 : end, is_last});
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Between reading a row's state from its slot and writing the slot, which may be the same one, segments meet.
__device__ __forceinline__ void arrive_segment(const ScanPlan& plan) {
  if (plan.num_segments > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void wait_segments(const ScanPlan& plan) {
  if (plan.num_segments > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

#endif

// Segments that take equally long: each is shorter than the one before by what its steps up to there take.
inline void cut_segments(ScanPlan& plan, int num_segments) {
  plan.num_segments = num_segments;
  float begins[kMaxSegments + 1] = {};
  float length = 1.0f;
  for (int i = 1; i <= num_segments; ++i, length *= 1.0f - kStepCost) begins[i] = begins[i - 1] + length;
  for (int i = 0; i <= num_segments; ++i) {
    plan.segment_begin[i] = static_cast<int>(begins[i] / begins[num_segments] * kWholeRow + 0.5f);
  }
}

// row_items: of each row. resident_blocks: of a multiprocessor, where a block takes items one after the other; only
// where it is one do several share a row.
inline ScanPlan plan_scan(const SsmScanParams& params, int row_items, int resident_blocks, const char* op) {
  const int64_t max_query_len = params.max_query_len > 0 ? params.max_query_len : params.num_tokens;
  ScanPlan plan{};
  plan.row_items = row_items;
  plan.is_all_rows = params.rows.num_rows * max_query_len <= 4 * params.num_tokens;  // few can be short
  const int64_t num_rows = plan.is_all_rows ? params.rows.num_rows : max_chunked_rows(params);
  require(num_rows * row_items <= INT32_MAX / 2, op, "num_rows * num_heads is too large for one launch");
  plan.num_items = static_cast<int>(num_rows) * row_items;
  const int num_processors = device_attribute(cudaDevAttrMultiProcessorCount, op);
  plan.num_clusters = std::min(plan.num_items, num_processors * resident_blocks);
  const int num_sharing = resident_blocks == 1 ? num_processors / std::max(plan.num_items, 1) : 1;
  cut_segments(plan, std::clamp(num_sharing, 1, kMaxSegments));
  return plan;
}

// Then, where rows without chunks have no items, a launch for them.
template <typename Kernel, typename... Arguments>
void launch_plan(Kernel kernel, const ScanPlan& plan, int num_threads, int shared_bytes, const SsmScanParams& params,
                 cudaStream_t stream, const char* op, const Arguments&... arguments) {
  if (plan.num_clusters > 0) {
    launch_chained_clusters(op, kernel, dim3(static_cast<unsigned>(plan.num_clusters * plan.num_segments)),
                            plan.num_segments, num_threads, shared_bytes, stream, params, arguments..., plan);
  }
  if (!plan.is_all_rows) launch_short_rows_scan(params, stream);
}

}  // namespace headway::cuda::chunk
