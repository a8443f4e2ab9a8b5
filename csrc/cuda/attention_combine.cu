// Second half of the split attention: merges the splits of a row, in order from position 0.
#include "cuda/attention_split.cuh"
#include "cuda/common/dtype.cuh"

namespace headway::cuda {
namespace {

constexpr int kCombineThreads = 128;

// Sum over the block of one value a thread; all threads get it.
__device__ int block_total(int value, int* scratch) {
  value = __reduce_add_sync(kFullWarp, value);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  int total = 0;
  for (int i = 0; i < kCombineThreads / kWarpSize; ++i) total += scratch[i];
  return total;
}

// Merges the splits of one fragment, in order. Grid: rows x (fragments x key heads).
template <typename T>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const __grid_constant__ SplitParams params) {
  __shared__ int scratch[2][kCombineThreads / kWarpSize];
  const int r = static_cast<int>(blockIdx.x);
  const int num_kv_heads = params.attention.num_kv_heads;
  const int head_dim = params.attention.head_dim;
  const QueryRow row = query_row(params.attention, r);
  const int splits = num_splits(row);
  const int index = static_cast<int>(blockIdx.y) / num_kv_heads;
  if (row.num_queries > kMaxSplitQueries || splits <= 1 || index >= num_fragments(row, params.group)) return;

  int before = 0;
  int all = 0;
  for (int other = static_cast<int>(threadIdx.x); other < params.attention.rows.num_rows; other += kCombineThreads) {
    const int units = num_units(params, other, false);
    all += units;
    if (other < r) before += units;
  }
  before = block_total(before, scratch[0]);
  all = block_total(all, scratch[1]);
  if (static_cast<int64_t>(all) * num_kv_heads > params.max_partials) return;  // the split kernel finished the rows

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int kv_head = static_cast<int>(blockIdx.y) % num_kv_heads;
  const int64_t first_unit = before + static_cast<int64_t>(index) * splits;
  const Fragment fragment = make_fragment(params, row, index, kv_head, lane);
  const int num_packed = min(kFragmentRows, row.num_queries * params.group - fragment.first);
  const int64_t stride = static_cast<int64_t>(params.attention.num_heads) * head_dim;
  auto* out = static_cast<T*>(params.attention.out);
  for (int m = static_cast<int>(threadIdx.x) / kWarpSize; m < num_packed; m += kCombineThreads / kWarpSize) {
    T* target = out + packed_offset(params, fragment, fragment.first + m, stride);
    for (int channel = 2 * lane; channel < head_dim; channel += 2 * kWarpSize) {
      float largest = minus_infinity();
      float sum = 0.0f;
      float2 value = make_float2(0.0f, 0.0f);
#pragma unroll 4
      for (int split = 0; split < splits; ++split) {
        const int64_t item = (first_unit + split) * num_kv_heads + kv_head;
        const float* partial = params.partials + item * params.partial_words;
        const float* tails = partial + params.partial_rows * head_dim;
        const float2 later = *reinterpret_cast<const float2*>(partial + m * head_dim + channel);
        const MergeFactors factors = merge_factors(largest, tails[m], params.log2_scale);
        largest = factors.largest;
        sum = merge(sum, tails[params.partial_rows + m], factors);
        value.x = merge(value.x, later.x, factors);
        value.y = merge(value.y, later.y, factors);
      }
      const float factor = reciprocal_of(sum);
      *reinterpret_cast<uint32_t*>(target + channel) =
          pack_pair<T>(__fmul_rn(value.x, factor), __fmul_rn(value.y, factor));
    }
  }
}

}  // namespace

void launch_combine(const SplitParams& params, int num_fragments, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.attention.rows.num_rows),
                  static_cast<unsigned>(num_fragments * params.attention.num_kv_heads));
  if (params.attention.dtype == DType::kBFloat16) {
    combine_kernel<__nv_bfloat16><<<grid, kCombineThreads, 0, stream>>>(params);
  } else {
    combine_kernel<__half><<<grid, kCombineThreads, 0, stream>>>(params);
  }
  check_launch(kAttentionOp);
}

}  // namespace headway::cuda
