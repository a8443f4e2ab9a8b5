// Attention for rows of few queries (decode, and verification of drafts): bound by reading keys and values, so the work
// is cut along the keys. One warp takes one split of 512 keys for up to 16 packed rows (queries x heads that share a
// key head) and streams them through its own ring of shared memory, 16 keys a stage, without a block-wide barrier. A
// second kernel merges the splits. All lengths are read on the device: a captured graph serves any.
#include "cuda/attention_tile.cuh"
#include "cuda/common/dtype.cuh"

namespace headway::cuda {
namespace {

constexpr int kStageKeys = 16;
constexpr int kTileStages = kTileKeys / kStageKeys;
constexpr int kRingBytes = 26 * 1024;  // a warp; two blocks fit a multiprocessor
constexpr int kMaxStages = 10;

template <int kDim>
inline constexpr int kStageBytes = kStageKeys * TileRows<kDim>::kStrideBytes;
template <int kDim>
inline constexpr int kStages =
    kRingBytes / kStageBytes<kDim> < kMaxStages ? kRingBytes / kStageBytes<kDim> : kMaxStages;

struct SplitParams {
  PagedAttentionParams attention;
  int group;  // query heads a key head
  float log2_scale;
  int64_t max_partials;
  int64_t partial_rows;
  int64_t partial_words;
  float* partials;
  void* totals;
};

__device__ __forceinline__ int num_fragments(const QueryRow& row, int group) {
  return (row.num_queries * group + kFragmentRows - 1) / kFragmentRows;
}

__device__ __forceinline__ int num_splits(const QueryRow& row) {
  return (row.kv_len + kSplitKeys - 1) / kSplitKeys;
}

// Warps' worth of work of row r, per key head.
__device__ __forceinline__ int num_units(const SplitParams& params, int r, bool is_serial) {
  const QueryRow row = query_row(params.attention, r);
  if (row.num_queries > kMaxSplitQueries) return 0;
  return num_fragments(row, params.group) * (is_serial ? 1 : num_splits(row));
}

// 16 packed rows of one key head. Lane l works on packed rows l / 4 and l / 4 + 8.
struct Fragment {
  QueryRow row;
  int kv_head;
  int first;  // packed index of the first; packed index = query * group + head of the group
  int limit[2];  // keys the lane's rows see; 0 for rows beyond the last
};

__device__ Fragment make_fragment(const SplitParams& params, const QueryRow& row, int index, int kv_head, int lane) {
  Fragment fragment{row, kv_head, index * kFragmentRows, {0, 0}};
  for (int half = 0; half < 2; ++half) {
    const int packed = fragment.first + lane / 4 + 8 * half;
    if (packed < row.num_queries * params.group) {
      fragment.limit[half] = row.first_position + packed / params.group + 1;
    }
  }
  return fragment;
}

// Element offset of packed row `packed` in a [T, Hq, D] tensor with tokens `stride` apart.
__device__ __forceinline__ int64_t packed_offset(const SplitParams& params, const Fragment& fragment, int packed,
                                                 int64_t stride) {
  const int query = packed / params.group;
  const int head = fragment.kv_head * params.group + packed % params.group;
  return (fragment.row.first_token + query) * stride + static_cast<int64_t>(head) * params.attention.head_dim;
}

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

// Streams one split's keys and values through the warp's ring: tile by tile, keys before values, kStageKeys a stage.
template <typename T, int kDim>
class SplitStream {
 public:
  __device__ SplitStream(const SplitParams& params, const Fragment& fragment, int split, uint32_t ring, int lane)
      : cache_(params.attention.cache),
        blocks_(fragment.row.blocks),
        token_stride_(static_cast<int64_t>(params.attention.num_kv_heads) * params.attention.head_dim),
        head_offset_(static_cast<int64_t>(fragment.kv_head) * params.attention.head_dim),
        head_dim_(params.attention.head_dim),
        begin_(split * kSplitKeys),
        end_(min(begin_ + kSplitKeys, fragment.row.kv_len)),
        ring_(ring),
        lane_(lane) {
    const int size = cache_.block_size;
    has_whole_stages_ = size % kStageKeys == 0;
    first_block_ = begin_ / size;
    const int index = first_block_ + lane;  // a split spans at most 32 blocks of 16 keys or more
    block_ = has_whole_stages_ && static_cast<int64_t>(index) * size < end_ ? blocks_[index] : kDummyBlockId;
    num_stages_ = 0;
    for (int tile = begin_; tile < end_; tile += kTileKeys) num_stages_ += 2 * stages_of(tile);
    __syncwarp();  // the ring's last contents have been read
    for (int stage = 0; stage < kStages<kDim> - 1; ++stage) issue(stage);
  }

  __device__ int begin() const { return begin_; }
  __device__ int end() const { return end_; }
  // Stages of keys (and of values) of the tile that begins at key `tile`.
  __device__ int stages_of(int tile) const { return min(kTileStages, (end_ - tile + kStageKeys - 1) / kStageKeys); }

  // Shared address of the next stage; it is overwritten after the call after this one.
  __device__ uint32_t next() {
    wait_copies<kStages<kDim> - 2>();
    __syncwarp();
    issue(next_ + kStages<kDim> - 1);
    return ring_ + next_++ % kStages<kDim> * kStageBytes<kDim>;
  }

 private:
  static constexpr int kDummyBlockId = 0;

  __device__ void issue(int stage) {
    if (stage < num_stages_) {
      const int tile = begin_ + stage / (2 * kTileStages) * kTileKeys;
      const int stages = stages_of(tile);
      const int place = stage % (2 * kTileStages);
      const bool is_value = place >= stages;
      const int key = tile + (is_value ? place - stages : place) * kStageKeys;
      copy_stage(static_cast<const T*>(is_value ? cache_.values : cache_.keys), key,
                 ring_ + stage % kStages<kDim> * kStageBytes<kDim>);
    }
    commit_copies();
  }

  __device__ void copy_stage(const T* cache, int key, uint32_t target) {
    const int size = cache_.block_size;
    const T* first = cache;
    if (has_whole_stages_) {
      const int64_t block = __shfl_sync(kFullWarp, block_, key / size - first_block_);
      first = cache + block * cache_.block_stride + key % size * token_stride_ + head_offset_;
    }
#pragma unroll
    for (int i = 0; i < TileRows<kDim>::kPieces / 2; ++i) {
      const int index = lane_ + i * kWarpSize;
      const int row = index / TileRows<kDim>::kPieces;
      const int piece = index % TileRows<kDim>::kPieces;
      const bool is_valid = key + row < end_ && piece * 8 < head_dim_;
      const T* source = first + row * token_stride_;
      if (!has_whole_stages_ && is_valid) {
        const int64_t block = blocks_[(key + row) / size];
        source = cache + block * cache_.block_stride + (key + row) % size * token_stride_ + head_offset_;
      }
      copy_async(TileRows<kDim>::piece(target, row, piece), is_valid ? source + piece * 8 : cache, is_valid);
    }
  }

  const KvCache& cache_;
  const int32_t* blocks_;
  int64_t token_stride_;
  int64_t head_offset_;
  int head_dim_;
  int begin_;
  int end_;
  uint32_t ring_;
  int lane_;
  bool has_whole_stages_;
  int first_block_;
  int block_;  // of this lane
  int num_stages_;
  int next_ = 0;
};

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
  const auto run = [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_dtype<T>(params, num_items, stream);
    check_launch(kAttentionOp);
    if (max_splits == 1) return;
    const dim3 grid(static_cast<unsigned>(attention.rows.num_rows),
                    static_cast<unsigned>(fragments * attention.num_kv_heads));
    combine_kernel<T><<<grid, kCombineThreads, 0, stream>>>(params);
    check_launch(kAttentionOp);
  };
  if (attention.dtype == DType::kBFloat16) {
    run(TypeTag<__nv_bfloat16>{});
  } else {
    run(TypeTag<__half>{});
  }
}

}  // namespace headway::cuda
