// The ring of shared memory through which one warp streams keys and values to the warps of its block that compute. The
// ring runs on across steps and items, so that the next item's keys arrive while this one's are used.
#pragma once

#include "cuda/attention_decode.cuh"
#include "cuda/common/mbarrier.cuh"

namespace headway::cuda {

template <int kDim>
inline constexpr int kStepKeys = decode_step_keys(kDim);
template <int kDim>
inline constexpr int kSlotKeys = kStepKeys<kDim> / 2;
template <int kDim>
inline constexpr int kSlotBytes = kSlotKeys<kDim> * TileRows<kDim>::kStrideBytes;

// A span of a row's keys (or all of them), for some of its packed rows.
struct DecodeItem {
  PackedRows rows;
  int begin;  // keys
  int end;
};

template <int kDim, int kSlots>
struct SlotRing {
  uint32_t slots;     // shared address of [kSlots][kSlotKeys, kDim]
  uint32_t barriers;  // of 2 kSlots of them: full, then empty

  __device__ uint32_t slot(int stage) const { return slots + stage % kSlots * kSlotBytes<kDim>; }
  __device__ Barrier full(int stage) const { return {barriers + stage % kSlots * 8}; }
  __device__ Barrier empty(int stage) const { return {barriers + (kSlots + stage % kSlots) * 8}; }
  __device__ static uint32_t parity(int stage) { return static_cast<uint32_t>(stage / kSlots) & 1; }

  // One thread, before a block-wide barrier.
  __device__ void init() const {
    for (int i = 0; i < kSlots; ++i) {
      full(i).init(kWarpSize);
      empty(i).init(kDecodeWarps);
    }
  }
};

// The streaming warp. For every step of an item: its slots of keys, then those of values.
template <typename T, int kDim, int kSlots>
class KeyValueStream {
 public:
  using Ring = SlotRing<kDim, kSlots>;

  __device__ KeyValueStream(const DecodeParams& params, const Ring& ring, int lane)
      : cache_(params.attention.cache),
        token_stride_(static_cast<int64_t>(params.attention.num_kv_heads) * params.attention.head_dim),
        head_dim_(params.attention.head_dim),
        ring_(ring),
        lane_(lane) {}

  __device__ void stream(const DecodeItem& item) {
    const int32_t* blocks = item.rows.row.blocks;
    const int64_t head_offset = static_cast<int64_t>(item.rows.kv_head) * head_dim_;
    int32_t ids[kLaneKeys];
    find_blocks(ids, blocks, item.begin, item.end);
    for (int first = item.begin; first < item.end; first += kStepKeys<kDim>) {
      int64_t offsets[kLaneKeys];  // of the lane's keys, lane + 32 i; -1 beyond the last
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) {
        const int key = first + lane_ + i * kWarpSize;
        const int64_t offset = ids[i] * cache_.block_stride + key % cache_.block_size * token_stride_ + head_offset;
        offsets[i] = key < item.end ? offset : -1;
      }
      find_blocks(ids, blocks, first + kStepKeys<kDim>, item.end);
      const int num_keys = min(kStepKeys<kDim>, item.end - first);
#pragma unroll
      for (int tensor = 0; tensor < 2; ++tensor) {
        const auto* source = static_cast<const T*>(tensor == 0 ? cache_.keys : cache_.values);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half * kSlotKeys<kDim> >= num_keys) break;
          ring_.empty(stage_).wait(Ring::parity(stage_) ^ 1);
          fill(source, offsets, half * kSlotRounds);
          ++stage_;
        }
      }
    }
  }

 private:
  static constexpr int kLaneKeys = kStepKeys<kDim> / kWarpSize;
  static constexpr int kSlotRounds = kSlotKeys<kDim> / kWarpSize;
  static constexpr int kPieces = TileRows<kDim>::kPieces;

  // Block ids of the lane's keys of the step at key `first`.
  __device__ void find_blocks(int32_t (&ids)[kLaneKeys], const int32_t* blocks, int first, int end) const {
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int key = first + lane_ + i * kWarpSize;
      ids[i] = key < end ? blocks[key / cache_.block_size] : 0;
    }
  }

  // Fills the slot of stage_ with the keys whose offsets start at index `round`; zeros beyond the last key and the head
  // dim, as what a weight of zero multiplies must be finite.
  __device__ void fill(const T* source, const int64_t (&offsets)[kLaneKeys], int round) {
    const uint32_t target = ring_.slot(stage_);
#pragma unroll
    for (int i = 0; i < kSlotRounds; ++i) {
#pragma unroll 4
      for (int j = 0; j < kPieces; ++j) {
        const int index = lane_ + j * kWarpSize;
        const int row = index / kPieces;
        const int piece = index % kPieces;
        const int64_t offset = __shfl_sync(kFullWarp, offsets[round + i], row);
        const bool is_valid = offset >= 0 && piece * 8 < head_dim_;
        copy_async(TileRows<kDim>::piece(target, row + i * kWarpSize, piece),
                   is_valid ? source + offset + piece * 8 : source, is_valid);
      }
    }
    ring_.full(stage_).arrive_after_copies();
  }

  const KvCache& cache_;
  int64_t token_stride_;
  int head_dim_;
  Ring ring_;
  int lane_;
  int stage_ = 0;
};

}  // namespace headway::cuda
