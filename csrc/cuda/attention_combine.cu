// Second half of the decode attention: folds a row's partial results along the tree of attention_decode.cuh. It starts
// while the decode kernel still runs.
#include "cuda/attention_decode.cuh"
#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"

namespace headway::cuda {
namespace {

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = kCombineWarps * kWarpSize;
constexpr int kMaxDim = 256;

struct CombineMemory {
  int counts[4][kCombineWarps];  // of items: before the row by steps and spans, of all rows by steps and spans
  float sums[kCombineWarps][kMaxDim];
  float largest[kCombineWarps];
  float totals[kCombineWarps];
};

// Where a row's partial results begin.
struct RowItems {
  Cut cut;
  int64_t first_unit;
};

__device__ RowItems find_items(const DecodeParams& params, CombineMemory& memory, int r) {
  int counts[4] = {};
  for (int other = static_cast<int>(threadIdx.x); other < params.attention.rows.num_rows; other += kCombineThreads) {
    const int steps = num_units(params, other, Cut::kSteps);
    const int spans = num_units(params, other, Cut::kSpans);
    if (other < r) {
      counts[0] += steps;
      counts[1] += spans;
    }
    counts[2] += steps;
    counts[3] += spans;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int sum = __reduce_add_sync(kFullWarp, counts[i]);
    if (threadIdx.x % kWarpSize == 0) memory.counts[i][threadIdx.x / kWarpSize] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    counts[i] = 0;
    for (int warp = 0; warp < kCombineWarps; ++warp) counts[i] += memory.counts[i][warp];
  }
  const int64_t num_kv_heads = params.attention.num_kv_heads;
  const Cut cut = choose_cut(params, counts[2] * num_kv_heads, counts[3] * num_kv_heads);
  return {cut, cut == Cut::kSteps ? counts[0] : counts[1]};
}

// Folds up to kSpanSteps partial results, of row `index` of items `stride` apart, in order; a warp's worth of work.
__device__ void fold_span(const DecodeParams& params, CombineMemory& memory, int64_t first_item, int64_t stride,
                          int count, int index, int warp, int lane) {
  const int head_dim = params.attention.head_dim;
  float largest = minus_infinity();
  float total = 0.0f;
  MergeFactors factors[kSpanSteps];
#pragma unroll
  for (int i = 0; i < kSpanSteps; ++i) {
    const Partial partial = partial_of(params, first_item + min(i, count - 1) * stride);
    factors[i].largest = partial.largest[index];
    factors[i].later = partial.totals[index];  // for the moment
  }
#pragma unroll
  for (int i = 0; i < kSpanSteps; ++i) {
    if (i >= count) break;
    const float later = factors[i].later;
    factors[i] = merge_factors(largest, factors[i].largest, params.log2_scale);
    largest = factors[i].largest;
    total = merge(total, later, factors[i]);
  }
  for (int channel = 2 * lane; channel < head_dim; channel += 2 * kWarpSize) {
    float2 parts[kSpanSteps];
#pragma unroll
    for (int i = 0; i < kSpanSteps; ++i) {
      const Partial partial = partial_of(params, first_item + min(i, count - 1) * stride);
      parts[i] = *reinterpret_cast<const float2*>(partial.sums + index * head_dim + channel);
    }
    float2 value = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kSpanSteps; ++i) {
      if (i >= count) break;
      value.x = merge(value.x, parts[i].x, factors[i]);
      value.y = merge(value.y, parts[i].y, factors[i]);
    }
    *reinterpret_cast<float2*>(&memory.sums[warp][channel]) = value;
  }
  if (lane == 0) {
    memory.largest[warp] = largest;
    memory.totals[warp] = total;
  }
}

// Grid: rows x (packed rows x key heads). A warp folds a span; the block folds its warps' spans.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const __grid_constant__ DecodeParams params) {
  __shared__ __align__(16) CombineMemory memory;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int num_kv_heads = params.attention.num_kv_heads;
  const int head_dim = params.attention.head_dim;
  const int packed = static_cast<int>(blockIdx.y) / num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.y) % num_kv_heads;
  const QueryRow row = query_row(params.attention, static_cast<int>(blockIdx.x));
  const RowItems items = find_items(params, memory, static_cast<int>(blockIdx.x));
  wait_for_previous_kernel();
  if (row.num_queries > kMaxDecodeQueries || packed >= row.num_queries * params.group) return;
  const int cuts = num_cuts(params, row, items.cut);
  if (items.cut == Cut::kRows || cuts == 1) return;  // the decode kernel finished the row

  const int groups = num_groups(params, row);
  const int group_rows = params.num_fragments * kFragmentRows;
  const int64_t stride = static_cast<int64_t>(groups) * num_kv_heads;
  const int64_t first_item = (items.first_unit + packed / group_rows) * num_kv_heads + kv_head;
  const int parts = items.cut == Cut::kSteps ? kSpanSteps : 1;  // of a span
  const int num_spans = (cuts + parts - 1) / parts;
  const int channel = 2 * thread;
  float largest = minus_infinity();
  float total = 0.0f;
  float2 value = make_float2(0.0f, 0.0f);
  for (int first = 0; first < num_spans; first += kCombineWarps) {
    const int span = first + warp;
    if (span < num_spans) {
      fold_span(params, memory, first_item + span * parts * stride, stride, min(parts, cuts - span * parts),
                packed % group_rows, warp, lane);
    }
    __syncthreads();
    if (channel < head_dim) {
      for (int i = 0; i < min(kCombineWarps, num_spans - first); ++i) {
        const MergeFactors factors = merge_factors(largest, memory.largest[i], params.log2_scale);
        largest = factors.largest;
        total = merge(total, memory.totals[i], factors);
        value.x = merge(value.x, memory.sums[i][channel], factors);
        value.y = merge(value.y, memory.sums[i][channel + 1], factors);
      }
    }
    __syncthreads();
  }
  if (channel >= head_dim) return;
  const PackedRows rows = packed_rows(params, row, packed / group_rows, kv_head);
  const int64_t out_stride = static_cast<int64_t>(params.attention.num_heads) * head_dim;
  auto* out = static_cast<T*>(params.attention.out);
  const float factor = reciprocal_of(total);
  *reinterpret_cast<uint32_t*>(out + packed_offset(params, rows, packed % group_rows, out_stride) + channel) =
      pack_pair<T>(__fmul_rn(value.x, factor), __fmul_rn(value.y, factor));
}

}  // namespace

void launch_combine(const DecodeParams& params, cudaStream_t stream) {
  const PagedAttentionParams& attention = params.attention;
  const int max_packed = std::min(attention.max_query_len, kMaxDecodeQueries) * params.group;
  const dim3 grid(static_cast<unsigned>(attention.rows.num_rows),
                  static_cast<unsigned>(max_packed * attention.num_kv_heads));
  auto* kernel = attention.dtype == DType::kBFloat16 ? combine_kernel<__nv_bfloat16> : combine_kernel<__half>;
  launch_chained(kAttentionOp, kernel, grid, kCombineThreads, stream, params);
}

}  // namespace headway::cuda
