// The copying warp of attention_warpgroup.cuh: takes blocks of packed rows until none is left, looks up where a tile's
// keys lie and has the copy engine fetch them, a box of neighbouring keys (and 64 channels) a lane.
#pragma once

#include "cuda/attention_warpgroup.cuh"

namespace headway::cuda::prefill {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kDim>
class CopyWarp {
 public:
  using Tile = Panels<kDim, kKeys>;

  __device__ CopyWarp(const WarpgroupParams& params, Shared<kDim>& shared)
      : params_(params), shared_(shared), lane_(static_cast<int>(threadIdx.x) % kWarpSize) {
    const int boxes = kKeys / params.box_keys;
    has_box_ = lane_ < boxes * Tile::kCount;
    box_key_ = lane_ % boxes * params.box_keys;
    panel_ = lane_ / boxes;
    offset_ = static_cast<uint32_t>(panel_ * Tile::kPanelBytes + box_key_ * wgmma::kPanelRowBytes);
  }

  __device__ void run(const QueryBlocks<kBlockRows>& blocks) {
    const int64_t count = blocks.count();
    int64_t index = blockIdx.x;
    for (unsigned turn = 0;; ++turn) {
      QueryBlock block{};
      if (index < count) block = blocks.at(index);
      announce(block, turn);
      if (index >= count) return;
      const unsigned taken = take_block();
      copy_block(block);
      index = gridDim.x + int64_t{__shfl_sync(kFullWarp, taken, 0)};
    }
  }

 private:
  static constexpr int kNoPlace = -1;

  __device__ void announce(const QueryBlock& block, unsigned turn) {
    shared_.blocks.wait_free(turn);
    if (lane_ != 0) return;
    shared_.blocks.slot(turn) = block;
    shared_.blocks.full_barrier(turn).arrive();
  }

  // Lane 0's: blocks differ in length, so each is given out when somebody has time for it.
  __device__ unsigned take_block() const { return lane_ == 0 ? atomicAdd(params_.num_taken, 1u) : 0; }

  __device__ void copy_block(const QueryBlock& block) {
    const int num_tiles = num_key_tiles(block);
    int place = find_place(block, 0);
    for (int n = 0; n < num_tiles; ++n, ++turn_) {
      const int next_place = find_place(block, n + 1);
      copy_tile(shared_.keys, params_.keys, block, n, place);
      copy_tile(shared_.values, params_.values, block, n, place);
      place = next_place;
    }
  }

  // The cache block of the lane's box in tile n; none beyond the last key: what is not copied becomes zeros.
  __device__ int find_place(const QueryBlock& block, int n) const {
    const int key = n * kKeys + box_key_;
    if (!has_box_ || key >= block.num_keys) return kNoPlace;
    return block.row.blocks[key / params_.prefill.attention.cache.block_size];
  }

  __device__ void copy_tile(TileRing<kDim>& ring, const CUtensorMap& map, const QueryBlock& block, int n, int place) {
    ring.wait_free(turn_);
    const Barrier full = ring.full_barrier(turn_);
    if (lane_ == 0) full.arrive_expecting(Tile::kBytes);
    __syncwarp();
    if (!has_box_) return;
    const int key = (n * kKeys + box_key_) % params_.prefill.attention.cache.block_size;
    const int indices[4] = {panel_ * wgmma::kPanelColumns, block.kv_head, key, place};
    copy_box(shared_address(ring.slot(turn_).bytes) + offset_, map, indices, full);
  }

  const WarpgroupParams& params_;
  Shared<kDim>& shared_;
  int lane_;
  bool has_box_;  // the lane's, of each tile:
  int box_key_;
  int panel_;
  uint32_t offset_;  // bytes
  unsigned turn_ = 0;
};

#endif

}  // namespace headway::cuda::prefill
