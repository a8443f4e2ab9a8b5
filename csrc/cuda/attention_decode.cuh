// What the decode kernels and the one that merges their results share: the tree of a query's sum, how a launch's work
// is numbered and cut, and where partial results lie.
//
// The tree depends on absolute positions alone: keys to steps (in the way of each kernel), steps folded in order to
// spans, spans folded in order. All steps of all rows form one list, cut into as many equal pieces as there are blocks.
// A span inside one piece leaves one partial result; of a span that is cut, the steps before the first cut leave one
// (the chain so far, in the span's place) and every later step leaves its own, so the cut never changes a bit. Where
// pieces hardly differ for it, or the workspace cannot hold all that, they end where spans do, or else where rows do.
// Where whole rows leave pieces for a block, but not for each of its lanes, the lanes take spans in turns.
#pragma once

#include "cuda/attention_tile.cuh"
#include "cuda/common/device.h"

namespace headway::cuda {

inline constexpr int kDecodeThreads = kDecodeWarps * 32;

struct DecodeParams {
  PagedAttentionParams attention;
  int group;  // query heads a key head
  float log2_scale;
  int num_channel_parts;
  int num_blocks;  // of the decode kernel's grid, times its lanes
  int num_lanes;  // of a block, that can take the spans of its piece in turns
  DecodePlan plan;
  float* partials;
};

inline DecodeParams make_decode_params(const PagedAttentionParams& attention, const DecodePlan& plan) {
  return {.attention = attention,
          .group = attention.num_heads / attention.num_kv_heads,
          .log2_scale = attention.scale * kLog2E,
          .num_channel_parts = num_channel_parts(attention.head_dim),
          .num_blocks = 0,
          .num_lanes = 1,
          .plan = plan,
          .partials = static_cast<float*>(attention.workspace)};
}

// As many as run at once, unless there is less to do.
inline int num_decode_blocks(const DecodeParams& params, int blocks_per_multiprocessor) {
  const PagedAttentionParams& attention = params.attention;
  const int num_multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, kAttentionOp);
  const int64_t resident = blocks_per_multiprocessor * std::min(kMaxMultiprocessors, num_multiprocessors);
  const int64_t lists = int64_t{attention.rows.num_rows} * attention.num_kv_heads * params.plan.num_parts;
  return static_cast<int>(std::min(resident, lists * params.plan.max_steps));
}

// Steps of row r, per key head and part.
__device__ __forceinline__ int num_steps_of(const DecodeParams& params, int r) {
  const QueryRow row = query_row(params.attention, r);
  if (row.num_queries == 0 || row.num_queries > kMaxDecodeQueries) return 0;
  return (row.kv_len + params.plan.step_keys - 1) / params.plan.step_keys;
}

// Where a list may be cut into pieces. kTurns: between rows, and the lanes of a block share its piece.
enum class Cuts { kSteps, kSpans, kRows, kTurns };

// The list of a launch's steps, by part, key head, row, position; and its cut into blocks' pieces. Blocks at the same
// place of different key heads read neighbouring memory at the same time.
struct StepList {
  int head_steps;  // of each part and key head
  int part_steps;  // of each part
  int num_steps;
  int num_blocks;
  Cuts cuts;
  int num_places;  // of the spans' partial results
  int block_places;  // behind them, for each block, of steps that leave their own

  __device__ bool has_whole_rows() const { return cuts == Cuts::kRows || cuts == Cuts::kTurns; }
  // As far as steps are concerned; see cut_of.
  __device__ int begin_of(int block) const {
    return static_cast<int>(static_cast<int64_t>(block) * num_steps / num_blocks);
  }
  // The block whose piece holds step `index`, where cuts are at steps.
  __device__ int owner_of(int index) const {
    return static_cast<int>((static_cast<int64_t>(index + 1) * num_blocks - 1) / num_steps);
  }
};

// Steps of the rows, for one key head and part.
struct RowCounts {
  int total;
  int longest;
};

// A warp's work. prefix: sums of num_steps_of.
__device__ __forceinline__ RowCounts count_rows(const int32_t* prefix, int num_rows) {
  int longest = 0;
  for (int r = static_cast<int>(threadIdx.x) % kWarpSize; r < num_rows; r += kWarpSize) {
    longest = max(longest, prefix[r + 1] - prefix[r]);
  }
  return {prefix[num_rows], __reduce_max_sync(kFullWarp, longest)};
}

// Places of the spans' partial results in one part of the list. Those of one row and key head begin at floor(a / 8) +
// the number of rows and key heads before it, a steps having come before it: n steps have at most floor(n / 8) + 1
// spans.
__device__ __forceinline__ int part_places(const DecodeParams& params, int part_steps) {
  return part_steps / kSpanSteps + params.attention.rows.num_rows * params.attention.num_kv_heads;
}

// What a piece costs with cuts at steps is the steps that leave a partial result of their own, 3.5 on average, each
// written and read; with cuts at spans, the steps by which the longest piece exceeds the mean.
__device__ __forceinline__ bool prefers_spans(const DecodeParams& params, int piece_steps) {
  const int64_t step_bytes = int64_t{params.plan.step_keys} * params.attention.head_dim * 4;
  const int64_t longer = (kSpanSteps - piece_steps % kSpanSteps) % kSpanSteps;
  return longer * step_bytes < (kSpanSteps - 1) * params.plan.partial_bytes;
}

// Whether pieces of whole rows come close to equal ones, the longest row being what may spoil it: then nothing is left
// to combine.
__device__ __forceinline__ bool prefers_rows(int piece_steps, int longest) {
  const int longest_piece = (piece_steps + longest - 1) / longest * longest;
  return longest_piece - piece_steps <= piece_steps / 8;
}

// The same of a block's piece.
__device__ __forceinline__ bool prefers_turns(const DecodeParams& params, int num_steps, int longest) {
  const int num_blocks = params.num_blocks / params.num_lanes;
  return params.num_lanes > 1 && longest > kSpanSteps &&
         prefers_rows((num_steps + num_blocks - 1) / num_blocks, longest);
}

__device__ __forceinline__ StepList make_list(const DecodeParams& params, const RowCounts& counts) {
  StepList list{};
  list.head_steps = counts.total;
  list.part_steps = counts.total * params.attention.num_kv_heads;
  list.num_steps = list.part_steps * params.plan.num_parts;
  list.num_blocks = params.num_blocks;
  list.num_places = params.plan.num_parts * part_places(params, list.part_steps);
  const int piece_steps = (list.num_steps + list.num_blocks - 1) / list.num_blocks;
  list.block_places = min(kSpanSteps - 1, piece_steps);
  const int64_t step_places = int64_t{list.num_blocks} * list.block_places;
  if (list.num_steps > 0 && prefers_rows(piece_steps, counts.longest)) {
    list.cuts = Cuts::kRows;
  } else if (list.num_steps > 0 && prefers_turns(params, list.num_steps, counts.longest)) {
    list.cuts = Cuts::kTurns;
    list.num_blocks /= params.num_lanes;
  } else if (list.num_places + step_places <= params.plan.max_partials && !prefers_spans(params, piece_steps)) {
    list.cuts = Cuts::kSteps;
  } else {
    list.cuts = list.num_places <= params.plan.max_partials ? Cuts::kSpans : Cuts::kRows;
  }
  return list;
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
  const int first = kv_head * list.head_steps + before;
  const int lists = kv_head * params.attention.rows.num_rows + r;
  const int place = part * part_places(params, list.part_steps) + first / kSpanSteps + lists;
  return {part * list.part_steps + first, count, place};
}

// One step of the list.
struct Step {
  QueryRow row;
  RowSteps all;  // of its row, key head and part
  int part;
  int kv_head;
  int position;  // among its row's steps
  int first_packed;  // of the fragment's rows; packed index = query * group + head of the group
  int num_packed;  // of them; 0 or less: the row has no such fragment
  int first_key;
  int first_channel;  // of the values

  __device__ bool has_queries_of(const Step& other) const { return all.first == other.all.first; }
};

__device__ inline Step find_step(const DecodeParams& params, const StepList& list, const int32_t* prefix, int index) {
  Step step;
  step.part = index / list.part_steps;
  const int in_part = index - step.part * list.part_steps;
  step.kv_head = in_part / list.head_steps;
  const int in_head = in_part - step.kv_head * list.head_steps;
  const int r = find_row(prefix, params.attention.rows.num_rows, in_head);
  step.row = query_row(params.attention, r);
  step.position = in_head - prefix[r];
  step.first_key = step.position * params.plan.step_keys;
  step.all = row_steps(params, list, prefix[r], prefix[r + 1] - prefix[r], step.part, r, step.kv_head);
  step.first_packed = step.part / params.num_channel_parts * params.plan.fragment_rows;
  step.first_channel = step.part % params.num_channel_parts * kMaxSumChannels;
  step.num_packed = min(params.plan.fragment_rows, step.row.num_queries * params.group - step.first_packed);
  return step;
}

// Element offset of row `index` of the step's fragment in a [T, Hq, D] tensor with tokens `stride` apart.
__device__ __forceinline__ int64_t fragment_offset(const DecodeParams& params, const Step& step, int index,
                                                   int64_t stride) {
  const int packed = step.first_packed + index;
  const int head = step.kv_head * params.group + packed % params.group;
  return (step.row.first_token + packed / params.group) * stride +
         static_cast<int64_t>(head) * params.attention.head_dim;
}

// Where block `block`'s piece begins.
__device__ inline int cut_of(const DecodeParams& params, const StepList& list, const int32_t* prefix, int block) {
  const int cut = list.begin_of(block);
  if (list.cuts == Cuts::kSteps || cut == list.num_steps) return cut;
  const Step step = find_step(params, list, prefix, cut);
  if (list.has_whole_rows()) return step.position == 0 ? cut : step.all.first + step.all.count;
  const int nearest = (step.position + kSpanSteps / 2) / kSpanSteps * kSpanSteps;
  return step.all.first + min(nearest, step.all.count);
}

// Place of the partial result of a step that leaves its own.
__device__ __forceinline__ int64_t step_place(const StepList& list, int block, int index) {
  return list.num_places + int64_t{block} * list.block_places + index - list.begin_of(block);
}

// Where a block that holds whole rows keeps the row's sum so far, up to the span of step `position`. The threads that
// share a row do not wait for each other between reading a sum and writing the next.
__device__ __forceinline__ int64_t serial_place(int block, int position) {
  return 2 * block + position / kSpanSteps % 2;
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
