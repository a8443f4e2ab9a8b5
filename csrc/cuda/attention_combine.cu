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
  int counts[2][kCombineWarps];  // steps before the row, steps of all rows
  float4 sums[kCombineWarps][kWarpSize];
  float largest[kCombineWarps];
  float totals[kCombineWarps];
};

// Sums of num_steps_of: of the rows before r, and of all.
__device__ int2 count_steps(const DecodeParams& params, CombineMemory& memory, int r) {
  int2 counts = make_int2(0, 0);
  for (int other = static_cast<int>(threadIdx.x); other < params.attention.rows.num_rows; other += kCombineThreads) {
    const int steps = num_steps_of(params, other);
    if (other < r) counts.x += steps;
    counts.y += steps;
  }
  counts.x = __reduce_add_sync(kFullWarp, counts.x);
  counts.y = __reduce_add_sync(kFullWarp, counts.y);
  if (threadIdx.x % kWarpSize == 0) {
    memory.counts[0][threadIdx.x / kWarpSize] = counts.x;
    memory.counts[1][threadIdx.x / kWarpSize] = counts.y;
  }
  __syncthreads();
  counts = make_int2(0, 0);
  for (int warp = 0; warp < kCombineWarps; ++warp) {
    counts.x += memory.counts[0][warp];
    counts.y += memory.counts[1][warp];
  }
  return counts;
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

// Folds the partial results of row `index` of the fragment in one span, in order; a warp's work.
__device__ void fold_span(const DecodeParams& params, CombineMemory& memory, const StepList& list, const RowSteps& all,
                          int span, int index, int warp, int lane) {
  const int channels = part_channels(params);
  const SpanParts parts(list, all, span);
  const Partial mine = partial_of(params, parts.place(list, all, span, min(lane, parts.count - 1)));
  const float my_largest = mine.largest[index];
  const float my_total = mine.totals[index];
  const auto my_sums = reinterpret_cast<uint64_t>(mine.sums + index * channels);
  float4 words[kSpanSteps];
#pragma unroll
  for (int i = 0; i < kSpanSteps; ++i) {
    const auto* sums = reinterpret_cast<const float4*>(__shfl_sync(kFullWarp, my_sums, i));
    words[i] = i < parts.count && 4 * lane < channels ? sums[lane] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  float largest = minus_infinity();
  float total = 0.0f;
  float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int i = 0; i < kSpanSteps; ++i) {
    const float later = __shfl_sync(kFullWarp, my_largest, i);
    const float later_total = __shfl_sync(kFullWarp, my_total, i);
    if (i >= parts.count) break;
    const MergeFactors factors = merge_factors(largest, later, params.log2_scale);
    largest = factors.largest;
    total = merge(total, later_total, factors);
    value.x = merge(value.x, words[i].x, factors);
    value.y = merge(value.y, words[i].y, factors);
    value.z = merge(value.z, words[i].z, factors);
    value.w = merge(value.w, words[i].w, factors);
  }
  memory.sums[warp][lane] = value;
  if (lane == 0) {
    memory.largest[warp] = largest;
    memory.totals[warp] = total;
  }
}

// What a warp folds of a packed row's spans.
struct RowSum {
  float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float largest = minus_infinity();
  float total = 0.0f;

  __device__ void add(const CombineMemory& memory, int warp, int lane, float log2_scale) {
    const MergeFactors factors = merge_factors(largest, memory.largest[warp], log2_scale);
    const float4 later = memory.sums[warp][lane];
    largest = factors.largest;
    total = merge(total, memory.totals[warp], factors);
    value.x = merge(value.x, later.x, factors);
    value.y = merge(value.y, later.y, factors);
    value.z = merge(value.z, later.z, factors);
    value.w = merge(value.w, later.w, factors);
  }
};

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

// Grid: rows x (runs of packed rows x key heads x parts of the channels). As many warps as a row has spans, up to all,
// fold one span each, and the first of them folds what they found; the others take further packed rows of the run.
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
  const int2 counts = count_steps(params, memory, r);
  const StepList list = make_list(params, counts.y);
  wait_for_previous_kernel();
  const int end_packed = min(first_packed + run_rows, row.num_queries * params.group);
  if (row.num_queries > kMaxDecodeQueries || first_packed >= end_packed) return;
  const int part = first_packed / params.plan.fragment_rows * params.num_channel_parts + channel_part;
  const int steps = num_steps_of(params, r);
  const RowSteps all = row_steps(params, list, counts.x, steps, part, r, kv_head);
  const int num_spans = (all.count + kSpanSteps - 1) / kSpanSteps;
  if (list.cuts == Cuts::kRows || (num_spans == 1 && SpanParts(list, all, 0).count == 1))
    return;  // the kernel before wrote it

  const int row_warps = num_spans > 4 ? kCombineWarps : num_spans > 2 ? 4 : num_spans;
  const int my_span = warp % row_warps;
  for (int base = first_packed; base < end_packed; base += kCombineWarps / row_warps) {
    const int packed = base + warp / row_warps;
    RowSum sum;
    for (int first = 0; first < num_spans; first += row_warps) {
      if (packed < end_packed && first + my_span < num_spans) {
        fold_span(params, memory, list, all, first + my_span, packed % params.plan.fragment_rows, warp, lane);
      }
      __syncthreads();
      if (my_span == 0) {
        for (int i = 0; i < min(row_warps, num_spans - first); ++i) sum.add(memory, warp + i, lane, params.log2_scale);
      }
      __syncthreads();
    }
    if (my_span != 0 || packed >= end_packed) continue;
    write_row<T>(params, row, kv_head, packed, channel_part * kMaxSumChannels, lane, sum);
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
