// Second half of the decode attention: folds a row's partial results along the tree of attention_decode.cuh. It starts
// while the decode kernel still runs.
#include "cuda/attention_decode.cuh"
#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"

namespace headway::cuda {
namespace {

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = kCombineWarps * kWarpSize;
constexpr int64_t kCombineBlocks = 4 * kMaxMultiprocessors;  // that are worth starting
static_assert(kMaxSumChannels == 4 * kWarpSize, "a lane holds four channels");

struct CombineMemory {
  int before[kCombineWarps];  // steps of the rows before the block's
  RowCounts all[kCombineWarps];
  float4 sums[kCombineWarps][kWarpSize];
  float largest[kCombineWarps];
  float totals[kCombineWarps];
};

struct RowPlace {
  int before;  // steps of the rows before it
  RowCounts all;
};

__device__ RowPlace place_row(const DecodeParams& params, CombineMemory& memory, int r) {
  RowPlace place{};
  for (int other = static_cast<int>(threadIdx.x); other < params.attention.rows.num_rows; other += kCombineThreads) {
    const int steps = num_steps_of(params, other);
    if (other < r) place.before += steps;
    place.all.total += steps;
    place.all.longest = max(place.all.longest, steps);
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  memory.before[warp] = __reduce_add_sync(kFullWarp, place.before);
  memory.all[warp] = {__reduce_add_sync(kFullWarp, place.all.total), __reduce_max_sync(kFullWarp, place.all.longest)};
  __syncthreads();
  place = RowPlace{};
  for (int i = 0; i < kCombineWarps; ++i) {
    place.before += memory.before[i];
    place.all.total += memory.all[i].total;
    place.all.longest = max(place.all.longest, memory.all[i].longest);
  }
  return place;
}

// The partial results that a span left: the chain of its first steps, then each later step of them.
struct SpanParts {
  int count;
  int chained;  // steps of the first part

  __device__ SpanParts(const StepList& list, const RowSteps& all, int span) {
    const int first = all.first + span * kSpanSteps;
    const int steps = min(kSpanSteps, all.count - span * kSpanSteps);
    const bool is_cut = list.cuts == Cuts::kSteps;
    chained = is_cut ? min(steps, list.begin_of(list.owner_of(first) + 1) - first) : steps;
    count = 1 + steps - chained;
  }

  __device__ int64_t place(const StepList& list, const RowSteps& all, int span, int part) const {
    if (part == 0) return all.place + span;
    const int index = all.first + span * kSpanSteps + chained + part - 1;
    return step_place(list, list.owner_of(index), index);
  }
};

// What a warp folds of a packed row: four channels a lane.
struct RowSum {
  float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float largest = minus_infinity();
  float total = 0.0f;

  __device__ void add(const float4& later, float later_largest, float later_total, float log2_scale) {
    const MergeFactors factors = merge_factors(largest, later_largest, log2_scale);
    largest = factors.largest;
    total = merge(total, later_total, factors);
    value.x = merge(value.x, later.x, factors);
    value.y = merge(value.y, later.y, factors);
    value.z = merge(value.z, later.z, factors);
    value.w = merge(value.w, later.w, factors);
  }
};

constexpr int kLoads = 8;  // partial results under way at once
static_assert(kLoads >= kSpanSteps);

// Adds row `index` of the fragment in `count` partial results, at most kLoads, in order; my_place: lane i's, of the
// i-th. A warp's work.
__device__ void add_partials(const DecodeParams& params, RowSum& sum, int64_t my_place, int count, int index,
                             int lane) {
  const int channels = part_channels(params);
  const Partial mine = partial_of(params, my_place);
  const float my_largest = mine.largest[index];
  const float my_total = mine.totals[index];
  const auto my_sums = reinterpret_cast<uint64_t>(mine.sums + index * channels);
  float4 words[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const auto* sums = reinterpret_cast<const float4*>(__shfl_sync(kFullWarp, my_sums, i));
    words[i] = i < count && 4 * lane < channels ? sums[lane] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const float later = __shfl_sync(kFullWarp, my_largest, i);
    const float later_total = __shfl_sync(kFullWarp, my_total, i);
    if (i < count) sum.add(words[i], later, later_total, params.log2_scale);
  }
}

// What a span left, cut or not.
__device__ RowSum fold_span(const DecodeParams& params, const StepList& list, const RowSteps& all, int span, int index,
                            int lane) {
  const SpanParts parts(list, all, span);
  RowSum sum;
  add_partials(params, sum, parts.place(list, all, span, min(lane, parts.count - 1)), parts.count, index, lane);
  return sum;
}

// Of spans none of which is cut.
__device__ RowSum fold_whole_spans(const DecodeParams& params, const RowSteps& all, int num_spans, int index,
                                   int lane) {
  RowSum sum;
  for (int first = 0; first < num_spans; first += kLoads) {
    const int count = min(kLoads, num_spans - first);
    add_partials(params, sum, all.place + first + min(lane, count - 1), count, index, lane);
  }
  return sum;
}

// Four channels a lane, from first_channel on.
template <typename T>
__device__ void write_row(const DecodeParams& params, const QueryRow& row, int kv_head, int packed, int first_channel,
                          int lane, const RowSum& sum) {
  const int head_dim = params.attention.head_dim;
  const int channel = first_channel + 4 * lane;
  if (channel >= head_dim) return;
  const int64_t token = row.first_token + packed / params.group;
  const int head = kv_head * params.group + packed % params.group;
  T* out = static_cast<T*>(params.attention.out) + (token * params.attention.num_heads + head) * head_dim;
  const float factor = reciprocal_of(sum.total);
  *reinterpret_cast<uint2*>(out + channel) =
      make_uint2(pack_pair<T>(__fmul_rn(sum.value.x, factor), __fmul_rn(sum.value.y, factor)),
                 pack_pair<T>(__fmul_rn(sum.value.z, factor), __fmul_rn(sum.value.w, factor)));
}

// Packed rows of one row and key head, of one fragment.
struct PackedRun {
  int begin;
  int end;
};

// Of cut spans: as many warps as a row has spans, up to all, fold one span each, and the first of them folds what they
// found; the others take further packed rows of the run.
template <typename Write>
__device__ void combine_steps(const DecodeParams& params, CombineMemory& memory, const StepList& list,
                              const RowSteps& all, int num_spans, const PackedRun& run, Write write) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int row_warps = num_spans > 4 ? kCombineWarps : num_spans > 2 ? 4 : num_spans;
  const int my_span = warp % row_warps;
  for (int base = run.begin; base < run.end; base += kCombineWarps / row_warps) {
    const int packed = base + warp / row_warps;
    RowSum row;
    for (int first = 0; first < num_spans; first += row_warps) {
      if (packed < run.end && first + my_span < num_spans) {
        const int index = packed % params.plan.fragment_rows;
        const RowSum sum = fold_span(params, list, all, first + my_span, index, lane);
        memory.sums[warp][lane] = sum.value;
        memory.largest[warp] = sum.largest;
        memory.totals[warp] = sum.total;
      }
      __syncthreads();
      for (int i = warp; my_span == 0 && i < warp + min(row_warps, num_spans - first); ++i) {
        row.add(memory.sums[i][lane], memory.largest[i], memory.totals[i], params.log2_scale);
      }
      __syncthreads();
    }
    if (my_span == 0 && packed < run.end) write(packed, row);
  }
}

// Grid: rows x (runs of packed rows x key heads x parts of the channels).
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ DecodeParams params, int run_rows) {
  __shared__ __align__(16) CombineMemory memory;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int r = static_cast<int>(blockIdx.x);
  const int num_kv_heads = params.attention.num_kv_heads;
  const int channel_part = static_cast<int>(blockIdx.y) % params.num_channel_parts;
  const int kv_head = static_cast<int>(blockIdx.y) / params.num_channel_parts % num_kv_heads;
  const int first_packed = static_cast<int>(blockIdx.y) / params.num_channel_parts / num_kv_heads * run_rows;
  const QueryRow row = query_row(params.attention, r);
  const RowPlace place = place_row(params, memory, r);
  const StepList list = make_list(params, place.all);
  wait_for_previous_kernel();
  const PackedRun run{first_packed, min(first_packed + run_rows, row.num_queries * params.group)};
  if (row.num_queries > kMaxDecodeQueries || run.begin >= run.end) return;
  const int part = first_packed / params.plan.fragment_rows * params.num_channel_parts + channel_part;
  const RowSteps all = row_steps(params, list, place.before, num_steps_of(params, r), part, r, kv_head);
  const int num_spans = (all.count + kSpanSteps - 1) / kSpanSteps;
  // What the kernel before wrote.
  if (list.has_whole_rows() || (num_spans == 1 && SpanParts(list, all, 0).count == 1)) return;

  const auto write = [&](int packed, const RowSum& sum) {
    write_row<T>(params, row, kv_head, packed, channel_part * kMaxSumChannels, lane, sum);
  };
  if (list.cuts == Cuts::kSteps) return combine_steps(params, memory, list, all, num_spans, run, write);
  for (int packed = run.begin + warp; packed < run.end; packed += kCombineWarps) {
    write(packed, fold_whole_spans(params, all, num_spans, packed % params.plan.fragment_rows, lane));
  }
}

// Packed rows of a block: as few as fill the device, of one fragment. A power of two.
int combine_run_rows(const PagedAttentionParams& attention, int max_packed, int num_channel_parts) {
  const int64_t rows = int64_t{attention.rows.num_rows} * max_packed * attention.num_kv_heads * num_channel_parts;
  int run_rows = 1;
  while (run_rows < kFragmentRows && rows / run_rows > kCombineBlocks) run_rows *= 2;
  return run_rows;
}

}  // namespace

void launch_combine(const DecodeParams& params, cudaStream_t stream) {
  const PagedAttentionParams& attention = params.attention;
  const int max_packed = std::min(attention.max_query_len, kMaxDecodeQueries) * params.group;
  const int run_rows = combine_run_rows(attention, max_packed, params.num_channel_parts);
  const int num_runs = (max_packed + run_rows - 1) / run_rows;
  const dim3 grid(static_cast<unsigned>(attention.rows.num_rows),
                  static_cast<unsigned>(num_runs * attention.num_kv_heads * params.num_channel_parts));
  auto* kernel = attention.dtype == DType::kBFloat16 ? combine_kernel<__nv_bfloat16> : combine_kernel<__half>;
  launch_chained(kAttentionOp, kernel, grid, kCombineThreads, stream, params, run_rows);
}

}  // namespace headway::cuda
