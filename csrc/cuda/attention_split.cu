// Attention for rows of few queries (decode, and verification of drafts): bound by reading keys and values, so the work
// is cut along the keys. One warp takes one split of 512 keys for up to 16 packed rows (queries x heads that share a
// key head) and streams them through its own ring of shared memory, 16 keys a stage, without a block-wide barrier. A
// second kernel merges the splits. All lengths are read on the device: a captured graph serves any.
#include "cuda/attention_split.cuh"
#include "cuda/common/dtype.cuh"

namespace headway::cuda {
namespace {

template <typename T, int kDim>
__device__ void load_queries(const SplitParams& params, const Fragment& fragment, uint32_t (&query)[kDim / 16][4],
                             int lane) {
  const auto* q = static_cast<const T*>(params.attention.q);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool is_valid = fragment.limit[half] > 0;
    const int packed = fragment.first + lane / 4 + 8 * half;
    const T* source = is_valid ? q + packed_offset(params, fragment, packed, params.attention.q_stride) : q;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {  // channels 8 i + 2 (lane % 4) and the next
      const int channel = 8 * i + 2 * (lane % 4);
      const bool is_inside = is_valid && channel < params.attention.head_dim;
      query[i / 2][i % 2 * 2 + half] = is_inside ? *reinterpret_cast<const uint32_t*>(source + channel) : 0u;
    }
  }
}

__device__ __forceinline__ void mask_scores(float (&scores)[kScoreTiles][4], int tile, const int (&limit)[2],
                                            int lane) {
#pragma unroll
  for (int n = 0; n < kScoreTiles; ++n) {
    const int key = tile + 8 * n + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (key + i % 2 >= limit[i / 2]) scores[n][i] = minus_infinity();
    }
  }
}

// Attention over one split; `sums` are not divided, `state` is finished.
template <typename T, int kDim>
__device__ void attend_split(const SplitParams& params, const Fragment& fragment, int split, uint32_t ring,
                             const uint32_t (&query)[kDim / 16][4], float (&sums)[kDim / 8][4], SoftmaxState& state,
                             int lane) {
  SplitStream<T, kDim> stream(params, fragment, split, ring, lane);
  const int fewest_keys = fragment.row.first_position + fragment.first / params.group + 1;
#pragma unroll
  for (auto& sum : sums) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
  state = SoftmaxState{};
  for (int tile = stream.begin(); tile < stream.end(); tile += kTileKeys) {
    const int num_stages = stream.stages_of(tile);
    float scores[kScoreTiles][4] = {};
#pragma unroll
    for (int j = 0; j < kTileStages; ++j) {
      if (j >= num_stages) break;
      const uint32_t keys = stream.next();
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        multiply_keys<T, kDim>(scores[2 * j], scores[2 * j + 1], query[step], keys, step, lane);
      }
    }
    if (tile + kTileKeys > fewest_keys) mask_scores(scores, tile, fragment.limit, lane);

    float factor[2];
    softmax_tile(scores, state, factor, params.log2_scale);
    scale_rows(sums, factor);
#pragma unroll
    for (int j = 0; j < kTileStages; ++j) {
      if (j >= num_stages) break;
      const uint32_t values = stream.next();
      uint32_t probabilities[4];
      pack_probabilities<T>(probabilities, scores[2 * j], scores[2 * j + 1]);
#pragma unroll
      for (int pair = 0; pair < kDim / 16; ++pair) {
        uint32_t b[4];
        load_values<kDim>(b, values, pair, lane);
        multiply_add<T>(sums[2 * pair], probabilities, b[0], b[1]);
        multiply_add<T>(sums[2 * pair + 1], probabilities, b[2], b[3]);
      }
    }
  }
  finish_sums(state);
}

template <typename T, int kDim>
__device__ void write_output(const SplitParams& params, const Fragment& fragment, const float (&sums)[kDim / 8][4],
                             const SoftmaxState& state, int lane) {
  const int64_t stride = static_cast<int64_t>(params.attention.num_heads) * params.attention.head_dim;
  auto* out = static_cast<T*>(params.attention.out);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (fragment.limit[half] == 0) continue;
    const float factor = reciprocal_of(state.sum[half]);
    T* target = out + packed_offset(params, fragment, fragment.first + lane / 4 + 8 * half, stride);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int channel = 8 * n + 2 * (lane % 4);
      if (channel >= params.attention.head_dim) continue;
      *reinterpret_cast<uint32_t*>(target + channel) =
          pack_pair<T>(__fmul_rn(sums[n][2 * half], factor), __fmul_rn(sums[n][2 * half + 1], factor));
    }
  }
}

// A partial: [partial_rows, D] sums, [partial_rows] largest scores, [partial_rows] sums of exponentials.
template <int kDim>
__device__ void write_partial(const SplitParams& params, const Fragment& fragment, int64_t index,
                              const float (&sums)[kDim / 8][4], const SoftmaxState& state, int lane) {
  const int head_dim = params.attention.head_dim;
  float* partial = params.partials + index * params.partial_words;
  float* tails = partial + params.partial_rows * head_dim;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (fragment.limit[half] == 0) continue;
    const int row = lane / 4 + 8 * half;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int channel = 8 * n + 2 * (lane % 4);
      if (channel >= head_dim) continue;
      *reinterpret_cast<float2*>(partial + row * head_dim + channel) =
          make_float2(sums[n][2 * half], sums[n][2 * half + 1]);
    }
    if (lane % 4 == 0) {
      tails[row] = state.largest[half];
      tails[params.partial_rows + row] = state.sum[half];
    }
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads) split_kernel(const __grid_constant__ SplitParams params) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  constexpr int kWarpRing = kStages<kDim> * kStageBytes<kDim>;
  const uint32_t ring = shared_address(shared) + warp * kWarpRing;
  auto* prefix = reinterpret_cast<int32_t*>(shared + kAttentionWarps * kWarpRing);
  const int num_rows = params.attention.rows.num_rows;
  const int num_kv_heads = params.attention.num_kv_heads;

  // The step's work; without room for all partial results, rows instead of splits.
  prefix_rows(prefix, num_rows, [&](int r) { return num_units(params, r, false); });
  const bool is_serial = static_cast<int64_t>(prefix[num_rows]) * num_kv_heads > params.max_partials;
  if (is_serial) {
    __syncthreads();
    prefix_rows(prefix, num_rows, [&](int r) { return num_units(params, r, true); });
  }
  const int64_t num_items = static_cast<int64_t>(prefix[num_rows]) * num_kv_heads;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kAttentionWarps;

  for (int64_t item = static_cast<int64_t>(warp) * gridDim.x + blockIdx.x; item < num_items; item += num_warps) {
    const int unit = static_cast<int>(item / num_kv_heads);
    const int r = find_row(prefix, num_rows, unit);
    const QueryRow row = query_row(params.attention, r);
    const int row_splits = num_splits(row);
    const int splits = is_serial ? 1 : row_splits;  // items of a fragment
    const int local = unit - prefix[r];
    const int kv_head = static_cast<int>(item % num_kv_heads);
    const Fragment fragment = make_fragment(params, row, local / splits, kv_head, lane);
    uint32_t query[kDim / 16][4];
    load_queries<T, kDim>(params, fragment, query, lane);

    float sums[kDim / 8][4];
    SoftmaxState state;
    const int first = is_serial ? 0 : local % splits;
    const int last = is_serial ? row_splits - 1 : first;
    for (int split = first; split <= last; ++split) {
      attend_split<T, kDim>(params, fragment, split, ring, query, sums, state, lane);
      if (first == last) break;
      const RunningTotal total = running_total(params.totals);
      if (split > first) merge_total(total, 0, sums, state, params.log2_scale);
      if (split < last) save_total(total, 0, sums, state);
    }
    if (is_serial || splits == 1) {
      write_output<T, kDim>(params, fragment, sums, state, lane);
    } else {
      write_partial<kDim>(params, fragment, item, sums, state, lane);
    }
  }
}

template <typename T, int kDim>
void launch(const SplitParams& params, int64_t num_items, cudaStream_t stream) {
  int device = 0;
  int num_multiprocessors = 0;
  check(cudaGetDevice(&device), kAttentionOp);
  check(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device), kAttentionOp);
  const int64_t resident = std::min(kAttentionBlocks, 2 * num_multiprocessors);
  const auto num_blocks = static_cast<unsigned>(std::min(resident, num_items));
  const int ring_bytes = kAttentionWarps * kStages<kDim> * kStageBytes<kDim>;
  const int shared_bytes = ring_bytes + (params.attention.rows.num_rows + 1) * 4;
  auto* kernel = split_kernel<T, kDim>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), kAttentionOp);
  kernel<<<num_blocks, kAttentionThreads, shared_bytes, stream>>>(params);
}

template <typename T>
void launch_dtype(const SplitParams& params, int64_t num_items, cudaStream_t stream) {
  switch (padded_head_dim(params.attention.head_dim)) {
    case 32:
      return launch<T, 32>(params, num_items, stream);
    case 64:
      return launch<T, 64>(params, num_items, stream);
    case 80:
      return launch<T, 80>(params, num_items, stream);
    case 96:
      return launch<T, 96>(params, num_items, stream);
    case 128:
      return launch<T, 128>(params, num_items, stream);
    case 192:
      return launch<T, 192>(params, num_items, stream);
    default:
      return launch<T, 256>(params, num_items, stream);
  }
}

}  // namespace

void launch_split_attention(const PagedAttentionParams& attention, const AttentionWorkspace& plan,
                            cudaStream_t stream) {
  const int group = attention.num_heads / attention.num_kv_heads;
  const int queries = std::min(attention.max_query_len, kMaxSplitQueries);
  const int fragments = (queries * group + kFragmentRows - 1) / kFragmentRows;
  const int64_t max_splits = std::max(1, (attention.max_kv_len + kSplitKeys - 1) / kSplitKeys);
  const int64_t num_items = attention.rows.num_rows * max_splits * fragments * attention.num_kv_heads;
  auto* bytes = static_cast<unsigned char*>(attention.workspace);
  const SplitParams params{attention,
                           group,
                           attention.scale * kLog2E,
                           plan.max_partials,
                           plan.partial_rows,
                           plan.partial_bytes / 4,
                           reinterpret_cast<float*>(bytes + plan.total_bytes),
                           bytes};
  if (attention.dtype == DType::kBFloat16) {
    launch_dtype<__nv_bfloat16>(params, num_items, stream);
  } else {
    launch_dtype<__half>(params, num_items, stream);
  }
  check_launch(kAttentionOp);
  if (max_splits > 1) launch_combine(params, fragments, stream);
}

}  // namespace headway::cuda
