// The copying warp of attention_warpgroup.cuh: takes blocks of packed rows until none is left and has their keys and
// values fetched (attention_boxes.cuh).
#pragma once

#include "cuda/attention_boxes.cuh"
#include "cuda/attention_warpgroup.cuh"

namespace headway::cuda::prefill {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kDim>
class CopyWarp {
 public:
  __device__ CopyWarp(const WarpgroupParams& params, Shared<kDim>& shared)
      : params_(params),
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        box_(params.prefill.attention, params.box_keys) {}

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
    int place = box_.find_place(block.row, block.num_keys, 0);
    for (int n = 0; n < num_tiles; ++n, ++turn_) {
      const int first = n * kKeys;
      const int next_place = box_.find_place(block.row, block.num_keys, first + kKeys);
      box_.copy_tile(shared_.keys, turn_, params_.keys, block.kv_head, first, place);
      box_.copy_tile(shared_.values, turn_, params_.values, block.kv_head, first, place);
      place = next_place;
    }
  }

  const WarpgroupParams& params_;
  Shared<kDim>& shared_;
  int lane_;
  BoxLane<Tile<kDim>, kKeys, /*kIsReadOnce=*/false> box_;
  unsigned turn_ = 0;
};

#endif

}  // namespace headway::cuda::prefill
