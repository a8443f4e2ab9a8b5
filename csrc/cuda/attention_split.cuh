// What the split kernel and the one that merges its results share: how a step's work is numbered, and the stream of one
// split's keys and values through shared memory.
#pragma once

#include "cuda/attention_tile.cuh"

namespace headway::cuda {

inline constexpr int kStageKeys = 16;
inline constexpr int kTileStages = kTileKeys / kStageKeys;
inline constexpr int kRingBytes = 26 * 1024;  // a warp; two blocks fit a multiprocessor
inline constexpr int kMaxStages = 10;

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

__device__ __forceinline__ Fragment make_fragment(const SplitParams& params, const QueryRow& row, int index,
                                                  int kv_head, int lane) {
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

// Merges the splits of every row that has several; grid: rows x (fragments x key heads).
void launch_combine(const SplitParams& params, int num_fragments, cudaStream_t stream);

}  // namespace headway::cuda
