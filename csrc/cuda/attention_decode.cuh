// What the decode kernel and the one that merges its results share: the tree of a query's sum, how a step's work is cut
// and numbered, and where partial results lie.
//
// The tree depends on absolute positions alone: one product over a step of keys, steps folded in order to spans, spans
// folded in order. A step's work is cut at nodes of that tree (steps when it is small, spans, or whole rows when the
// workspace cannot hold partial results), so the cut never changes a bit.
#pragma once

#include "cuda/attention_tile.cuh"

namespace headway::cuda {

inline constexpr int kDecodeWarps = 4;  // that compute; one more streams keys and values
inline constexpr int kDecodeThreads = (kDecodeWarps + 1) * 32;

struct DecodeParams {
  PagedAttentionParams attention;
  int group;  // query heads a key head
  float log2_scale;
  int step_keys;  // decode_step_keys of the padded head dim
  int num_fragments;  // that one item may take
  int num_blocks;  // of the decode kernel's grid
  AttentionWorkspace plan;
  float* partials;
  void* totals;
};

enum class Cut { kSteps, kSpans, kRows };

// Of one row, per key head: groups of packed rows (queries x heads of the group) that one item takes.
__device__ __forceinline__ int num_groups(const DecodeParams& params, const QueryRow& row) {
  const int group_rows = params.num_fragments * kFragmentRows;
  return (row.num_queries * params.group + group_rows - 1) / group_rows;
}

__device__ __forceinline__ int cut_keys(const DecodeParams& params, Cut cut) {
  return cut == Cut::kSteps ? params.step_keys : params.step_keys * kSpanSteps;
}

__device__ __forceinline__ int num_cuts(const DecodeParams& params, const QueryRow& row, Cut cut) {
  const int keys = cut_keys(params, cut);
  return cut == Cut::kRows ? 1 : (row.kv_len + keys - 1) / keys;
}

// Items of row r, per key head.
__device__ __forceinline__ int num_units(const DecodeParams& params, int r, Cut cut) {
  const QueryRow row = query_row(params.attention, r);
  if (row.num_queries == 0 || row.num_queries > kMaxDecodeQueries) return 0;
  return num_groups(params, row) * num_cuts(params, row, cut);
}

// The finest cut whose partial results fit, unless a coarser one fills the device as well.
__device__ __forceinline__ Cut choose_cut(const DecodeParams& params, int64_t step_items, int64_t span_items) {
  if (span_items < kItemsPerBlock * params.num_blocks && step_items <= params.plan.max_partials) return Cut::kSteps;
  return span_items <= params.plan.max_partials ? Cut::kSpans : Cut::kRows;
}

// Packed rows of one key head. Of each fragment of 16, lane l works on rows l / 4 and l / 4 + 8.
struct PackedRows {
  QueryRow row;
  int kv_head;
  int first;  // packed index of the first; packed index = query * group + head of the group
  int count;

  __device__ int num_fragments() const { return (count + kFragmentRows - 1) / kFragmentRows; }
};

__device__ __forceinline__ PackedRows packed_rows(const DecodeParams& params, const QueryRow& row, int index,
                                                  int kv_head) {
  const int group_rows = params.num_fragments * kFragmentRows;
  const int first = index * group_rows;
  return {row, kv_head, first, min(group_rows, row.num_queries * params.group - first)};
}

// Element offset of a packed row in a [T, Hq, D] tensor with tokens `stride` apart.
__device__ __forceinline__ int64_t packed_offset(const DecodeParams& params, const PackedRows& rows, int index,
                                                 int64_t stride) {
  const int packed = rows.first + index;
  const int head = rows.kv_head * params.group + packed % params.group;
  return (rows.row.first_token + packed / params.group) * stride +
         static_cast<int64_t>(head) * params.attention.head_dim;
}

// A partial result: [partial_rows, D] sums, [partial_rows] largest scores, [partial_rows] sums of exponentials.
struct Partial {
  float* sums;
  float* largest;
  float* totals;
};

__device__ __forceinline__ Partial partial_of(const DecodeParams& params, int64_t item) {
  const int64_t rows = params.plan.partial_rows;
  float* sums = params.partials + item * (params.plan.partial_bytes / 4);
  float* largest = sums + rows * params.attention.head_dim;
  return {sums, largest, largest + rows};
}

// Merges the partial results of every row that has several.
void launch_combine(const DecodeParams& params, cudaStream_t stream);

}  // namespace headway::cuda
