// What the attention kernels on warpgroup products share: operands in shared memory, the ring of tiles through which
// the copy engine feeds them, and the tensor maps over a layer's cache.
#pragma once

#include "cuda/attention_tile.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/tensor_map.cuh"
#include "cuda/common/wgmma_wide.cuh"

namespace headway::cuda {

// kRows rows of kDim elements as panels of 64 columns: operands of wgmma.cuh.
template <int kDim, int kRows>
struct alignas(1024) Panels {
  static constexpr int kCount = kDim / wgmma::kPanelColumns;
  static constexpr int kPanelBytes = kRows * wgmma::kPanelRowBytes;
  static constexpr int kBytes = kCount * kPanelBytes;
  unsigned char bytes[kBytes];

  // Of 8 elements from `column` on.
  __device__ static int offset(int row, int column) {
    return column / wgmma::kPanelColumns * kPanelBytes + 2 * wgmma::panel_offset(row, column % wgmma::kPanelColumns);
  }
};

// kKeys keys of a key head, or their values, as the boxes of map_cache leave them: groups of 8 keys, of each a panel
// for every 64 channels. So one box takes all of a key.
template <int kDim, int kKeys>
struct alignas(1024) KeyTile {
  static constexpr int kGroupKeys = 8;
  static constexpr int kPanelBytes = kGroupKeys * wgmma::kPanelRowBytes;
  static constexpr int kPanels = kDim / wgmma::kPanelColumns;
  static constexpr int kGroupBytes = kPanels * kPanelBytes;
  static constexpr int kBytes = kKeys / kGroupKeys * kGroupBytes;
  // 16 keys on, in a product whose sum runs over keys.
  static constexpr int kStepBytes = 16 / kGroupKeys * kGroupBytes;
  unsigned char bytes[kBytes];

  // Of 8 elements from `channel` on.
  __device__ static int offset(int key, int channel) {
    return key / kGroupKeys * kGroupBytes + channel / wgmma::kPanelColumns * kPanelBytes +
           2 * wgmma::panel_offset(key % kGroupKeys, channel % wgmma::kPanelColumns);
  }

  // As an operand of scores, and of sums over keys.
  __device__ uint64_t describe_keys() const { return wgmma::describe(shared_address(bytes), kGroupBytes); }
  __device__ uint64_t describe_values() const {
    return wgmma::describe_panels(shared_address(bytes), kPanelBytes, kGroupBytes);
  }
};

// Slots that go round, filled by the copying warp or its copies and freed by kReaders: warps that compute, where only
// products read the slots, else their threads. turn: counts all uses of the ring, by each role alike.
template <typename Slot, unsigned kStages, int kReaders>
struct Ring {
  Slot slots[kStages];
  uint64_t full[kStages];
  uint64_t free[kStages];

  __device__ __forceinline__ Slot& slot(unsigned turn) { return slots[turn % kStages]; }
  __device__ __forceinline__ Barrier full_barrier(unsigned turn) { return {shared_address(&full[turn % kStages])}; }
  __device__ __forceinline__ Barrier free_barrier(unsigned turn) { return {shared_address(&free[turn % kStages])}; }

  __device__ void init() {
    for (unsigned i = 0; i < kStages; ++i) {
      full_barrier(i).init(1);
      free_barrier(i).init(kReaders);
    }
  }
  __device__ __forceinline__ void wait_full(unsigned turn) { full_barrier(turn).wait(turn / kStages % 2); }
  // A phase that has not begun counts as the end of the one before: the first slots are free.
  __device__ __forceinline__ void wait_free(unsigned turn) { free_barrier(turn).wait(turn / kStages % 2 ^ 1); }
  // By each reader; of a warp, one lane.
  __device__ __forceinline__ void arrive_free(unsigned turn) { free_barrier(turn).arrive(); }
};

// Keys of one copy: a power of two that divides the cache's block size, at most a tile; less than 16 is not worth it.
inline int box_keys_of(int block_size, int tile_keys) {
  for (int keys = tile_keys; keys >= 16; keys /= 2) {
    if (block_size % keys == 0) return keys;
  }
  return 0;
}

// Of a layer's keys or values: boxes of box_keys keys of a key head. The number of cache blocks is not known here, nor
// needed: block tables are right.
template <typename Tile>
CUtensorMap map_cache(const PagedAttentionParams& attention, void* base, int box_keys) {
  const KvCache& cache = attention.cache;
  const auto num_panels = static_cast<uint64_t>(attention.num_kv_heads * Tile::kPanels);
  const uint64_t key_bytes = num_panels * wgmma::kPanelRowBytes;
  constexpr uint64_t kElementBytes = 2;
  TensorBoxes<5> boxes{};
  boxes.base = base;
  boxes.sizes = {wgmma::kPanelColumns, Tile::kGroupKeys, num_panels,
                 static_cast<uint64_t>(cache.block_size / Tile::kGroupKeys), INT32_MAX};
  boxes.strides_bytes = {key_bytes, wgmma::kPanelRowBytes, Tile::kGroupKeys * key_bytes,
                         static_cast<uint64_t>(cache.block_stride) * kElementBytes};
  boxes.box = {wgmma::kPanelColumns, Tile::kGroupKeys, Tile::kPanels,
               static_cast<uint32_t>(box_keys / Tile::kGroupKeys), 1};
  // Told to fetch 256 bytes where rows of 128 are asked for, memory yields 4 % less.
  boxes.promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  return make_tensor_map(boxes, kAttentionOp);
}

}  // namespace headway::cuda
