// How a warp fetches tiles of a paged cache by the copy engine: a box of neighbouring keys a lane.
#pragma once

#include "cuda/attention_panels.cuh"

namespace headway::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A lane of the warp and its box of each tile. kIsReadOnce: that no other block reads the keys.
template <typename Tile, int kKeys, bool kIsReadOnce>
class BoxLane {
 public:
  __device__ BoxLane(const PagedAttentionParams& attention, int box_keys)
      : cache_(attention.cache), lane_(static_cast<int>(threadIdx.x) % kWarpSize) {
    has_box_ = lane_ < kKeys / box_keys;
    box_key_ = lane_ * box_keys;
    offset_ = static_cast<uint32_t>(box_key_ / Tile::kGroupKeys * Tile::kGroupBytes);
  }

  // The cache block of the box in the tile from key `first` on; none beyond the last of num_keys: what is not copied
  // becomes zeros.
  __device__ int find_place(const QueryRow& row, int num_keys, int first) const {
    const int key = first + box_key_;
    if (!has_box_ || key >= num_keys) return kNoPlace;
    return row.blocks[key / cache_.block_size];
  }

  // All lanes: starts the copy of the tile from key `first` on.
  template <typename TileRing>
  __device__ void copy_tile(TileRing& ring, unsigned turn, const CUtensorMap& map, int kv_head, int first,
                            int place) const {
    ring.wait_free(turn);
    const Barrier full = ring.full_barrier(turn);
    if (lane_ == 0) full.arrive_expecting(Tile::kBytes);
    __syncwarp();
    if (!has_box_) return;
    const int group = (first + box_key_) % cache_.block_size / Tile::kGroupKeys;
    const int indices[5] = {0, 0, kv_head * Tile::kPanels, group, place};
    const uint32_t target = shared_address(ring.slot(turn).bytes) + offset_;
    if constexpr (kIsReadOnce) {
      copy_box_once(target, map, indices, full);
    } else {
      copy_box(target, map, indices, full);
    }
  }

 private:
  static constexpr int kNoPlace = -1;

  const KvCache& cache_;
  int lane_;
  bool has_box_;  // a tile has fewer than 32
  int box_key_;
  uint32_t offset_;  // bytes
};

#endif

}  // namespace headway::cuda
