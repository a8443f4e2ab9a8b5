// What the decode kernel and the one that merges its results share: the tree of a query's sum, how a step's work is
// numbered and cut, and where partial results lie.
//
// The tree depends on absolute positions alone: 16 keys at a time within a leaf of 64, four leaves to a step, steps
// folded in order to spans, spans folded in order. All steps of all rows form one list, cut into as many equal pieces
// as there are blocks. A span inside one piece leaves one partial result; of a span that is cut, the steps before the
// first cut leave one (the chain so far, in the span's place) and every later step leaves its own, so the cut never
// changes a bit. When the workspace cannot hold all that, pieces end where rows do.
#pragma once

#include "cuda/attention_tile.cuh"

namespace headway::cuda {

inline constexpr int kDecodeThreads = kDecodeWarps * 32;

struct DecodeParams {
  PagedAttentionParams attention;
  int group;  // query heads a key head
  float log2_scale;
  int num_channel_parts;
  int num_parts;  // num_decode_parts
  int num_blocks;  // of the decode kernel's grid
  AttentionWorkspace plan;
  float* partials;
};

// Steps of row r, per key head and part.
__device__ __forceinline__ int num_steps_of(const DecodeParams& params, int r) {
  const QueryRow row = query_row(params.attention, r);
  if (row.num_queries == 0 || row.num_queries > kMaxDecodeQueries) return 0;
  return (row.kv_len + kStepKeys - 1) / kStepKeys;
}

// The list of a launch's steps, by part, row, key head, position; and its cut into blocks' pieces.
struct StepList {
  int part_steps;  // of each part
  int num_steps;
  int num_blocks;
  bool is_serial;  // pieces hold whole rows

  __device__ int begin_of(int block) const {
    return static_cast<int>(static_cast<int64_t>(block) * num_steps / num_blocks);
  }
  // The block whose piece holds step `index`, unless is_serial.
  __device__ int owner_of(int index) const {
    return static_cast<int>((static_cast<int64_t>(index + 1) * num_blocks - 1) / num_steps);
  }
};

// Places of the spans' partial results in one part of the list. Those of one row and key head begin at floor(a / 8) +
// the number of rows and key heads before it, a steps having come before it: n steps have at most floor(n / 8) + 1
// spans.
__device__ __forceinline__ int part_places(const DecodeParams& params, int part_steps) {
  return part_steps / kSpanSteps + params.attention.rows.num_rows * params.attention.num_kv_heads;
}

// part_rows_steps: steps of all rows, for one key head.
__device__ __forceinline__ StepList make_list(const DecodeParams& params, int part_rows_steps) {
  const int part_steps = part_rows_steps * params.attention.num_kv_heads;
  const int64_t places = static_cast<int64_t>(params.num_parts) * part_places(params, part_steps);
  const int64_t wanted = places + static_cast<int64_t>(params.num_blocks) * kSpanSteps;
  return {part_steps, part_steps * params.num_parts, params.num_blocks, wanted > params.plan.max_partials};
}

// The steps of one row and key head in one part of the list.
struct RowSteps {
  int first;  // index of the first in the list
  int count;
  int place;  // of the first span's partial result
};

// `before`: steps of the rows before r, `count`: of r, each for one key head.
__device__ __forceinline__ RowSteps row_steps(const DecodeParams& params, const StepList& list, int before, int count,
                                              int part, int r, int kv_head) {
  const int num_kv_heads = params.attention.num_kv_heads;
  const int first = before * num_kv_heads + kv_head * count;
  const int place = part * part_places(params, list.part_steps) + first / kSpanSteps + r * num_kv_heads + kv_head;
  return {part * list.part_steps + first, count, place};
}

// Place of the partial result of a step that leaves its own; `step` counts from the row's start.
__device__ __forceinline__ int64_t step_place(const DecodeParams& params, int block, int step) {
  const int64_t spans = params.plan.max_partials - static_cast<int64_t>(params.num_blocks) * kSpanSteps;
  return spans + static_cast<int64_t>(block) * kSpanSteps + step % kSpanSteps;
}

// A partial result: [partial_rows, channels of a part] sums, [partial_rows] largest scores, [partial_rows] sums of
// exponentials.
struct Partial {
  float* sums;
  float* largest;
  float* totals;
};

__device__ __forceinline__ int part_channels(const DecodeParams& params) {
  return min(params.attention.head_dim, kMaxSumChannels);
}

__device__ __forceinline__ Partial partial_of(const DecodeParams& params, int64_t place) {
  const int64_t rows = params.plan.partial_rows;
  float* sums = params.partials + place * (params.plan.partial_bytes / 4);
  float* largest = sums + rows * part_channels(params);
  return {sums, largest, largest + rows};
}

// Merges the partial results of every row that has several.
void launch_combine(const DecodeParams& params, cudaStream_t stream);

}  // namespace headway::cuda
