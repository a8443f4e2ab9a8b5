// How a warp fetches tiles of a paged cache by the copy engine: a box of neighbouring keys and 64 channels a lane.
#pragma once

#include "cuda/attention_panels.cuh"

namespace headway::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A lane of the warp and its box of each tile of kTileKeys keys. kIsReadOnce: that no other block reads the keys.
template <int kDim, int kTileKeys, bool kIsReadOnce>
class BoxLane {
 public:
  using Tile = Panels<kDim, kTileKeys>;

  __device__ BoxLane(const PagedAttentionParams& attention, int box_keys)
      : cache_(attention.cache), lane_(static_cast<int>(threadIdx.x) % kWarpSize) {
    const int boxes = kTileKeys / box_keys;
    has_box_ = lane_ < boxes * Tile::kCount;
    box_key_ = lane_ % boxes * box_keys;
    panel_ = lane_ / boxes;
    offset_ = static_cast<uint32_t>(panel_ * Tile::kPanelBytes + box_key_ * wgmma::kPanelRowBytes);
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
    const int indices[4] = {panel_ * wgmma::kPanelColumns, kv_head, (first + box_key_) % cache_.block_size, place};
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
  bool has_box_;  // few boxes leave lanes without one
  int box_key_;
  int panel_;
  uint32_t offset_;  // bytes
};

#endif

}  // namespace headway::cuda
