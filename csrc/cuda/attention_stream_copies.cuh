// The copying warp of attention_stream.cuh: walks over the block's piece, looks up where a tile's keys lie and has the
// copy engine fetch them, a box of neighbouring keys (and 64 channels) a lane, as far ahead as the ring reaches.
#pragma once

#include "cuda/attention_stream.cuh"

namespace headway::cuda::stream {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kDim, int kGroups>
class CopyWarp {
 public:
  using Tile = Panels<kDim, kKeys>;

  __device__ CopyWarp(const StreamParams& params, stream::Lane<kDim, kGroups>& shared)
      : params_(params), shared_(shared), lane_(static_cast<int>(threadIdx.x) % kWarpSize) {
    const int boxes = kKeys / params.box_keys;
    has_box_ = lane_ < boxes * Tile::kCount;
    box_key_ = lane_ % boxes * params.box_keys;
    panel_ = lane_ / boxes;
    offset_ = static_cast<uint32_t>(panel_ * Tile::kPanelBytes + box_key_ * wgmma::kPanelRowBytes);
  }

  __device__ void run() {
    const Piece& piece = shared_.piece;
    for (int index = piece.begin; index < piece.end;) {
      const Step step = find_step(params_.decode, piece.list, piece.prefix, index);
      const int end = piece.end_of_run(step, index);
      if (step.num_packed > 0) copy_run(step, end - index);
      index = end;
    }
  }

 private:
  static constexpr int kNoPlace = -1;

  // Keys and values of `count` steps.
  __device__ void copy_run(const Step& step, int count) {
    const int end = step.first_key + count * kStreamStepKeys;
    int places[kStepTiles];
    find_places(step, step.first_key, places);
    for (int first = step.first_key; first < end; first += kStreamStepKeys) {
      int next_places[kStepTiles];
      find_places(step, first + kStreamStepKeys, next_places);
#pragma unroll
      for (int tile = 0; tile < kStepTiles; ++tile) {
        copy_tile(params_.keys, step.kv_head, first + tile * kKeys, places[tile]);
      }
#pragma unroll
      for (int tile = 0; tile < kStepTiles; ++tile) {
        copy_tile(params_.values, step.kv_head, first + tile * kKeys, places[tile]);
      }
#pragma unroll
      for (int tile = 0; tile < kStepTiles; ++tile) places[tile] = next_places[tile];
    }
  }

  __device__ void find_places(const Step& step, int first, int (&places)[kStepTiles]) const {
#pragma unroll
    for (int tile = 0; tile < kStepTiles; ++tile) places[tile] = find_place(step, first + tile * kKeys);
  }

  // The cache block of the lane's box in the tile from key `first` on; none beyond the last key: what is not copied
  // becomes zeros.
  __device__ int find_place(const Step& step, int first) const {
    const int key = first + box_key_;
    if (!has_box_ || key >= step.row.kv_len) return kNoPlace;
    return step.row.blocks[key / params_.decode.attention.cache.block_size];
  }

  __device__ void copy_tile(const CUtensorMap& map, int kv_head, int first, int place) {
    auto& ring = shared_.tiles;
    ring.wait_free(turn_);
    const Barrier full = ring.full_barrier(turn_);
    if (lane_ == 0) full.arrive_expecting(Tile::kBytes);
    __syncwarp();
    if (has_box_) {
      const int key = (first + box_key_) % params_.decode.attention.cache.block_size;
      const int indices[4] = {panel_ * wgmma::kPanelColumns, kv_head, key, place};
      copy_box_once(shared_address(ring.slot(turn_).bytes) + offset_, map, indices, full);
    }
    ++turn_;
  }

  const StreamParams& params_;
  stream::Lane<kDim, kGroups>& shared_;
  int lane_;
  bool has_box_;  // the lane's, of each tile:
  int box_key_;
  int panel_;
  uint32_t offset_;  // bytes
  unsigned turn_ = 0;
};

#endif

}  // namespace headway::cuda::stream
