// The copying warp of attention_stream.cuh: walks over the block's piece and has its keys and values fetched
// (attention_boxes.cuh), as far ahead as the ring reaches.
#pragma once

#include "cuda/attention_boxes.cuh"
#include "cuda/attention_stream.cuh"

namespace headway::cuda::stream {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kDim, int kGroups>
class CopyWarp {
 public:
  __device__ CopyWarp(const StreamParams& params, stream::Lane<kDim, kGroups>& shared)
      : params_(params), shared_(shared), box_(params.decode.attention, params.box_keys) {}

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
  // Keys and values of `count` steps.
  __device__ void copy_run(const Step& step, int count) {
    const int end = step.first_key + count * kStreamStepKeys;
    int places[kStepTiles];
    find_places(step, step.first_key, places);
    for (int first = step.first_key; first < end; first += kStreamStepKeys) {
      int next_places[kStepTiles];
      find_places(step, first + kStreamStepKeys, next_places);
      copy_tiles(params_.keys, step.kv_head, first, places);
      copy_tiles(params_.values, step.kv_head, first, places);
#pragma unroll
      for (int tile = 0; tile < kStepTiles; ++tile) places[tile] = next_places[tile];
    }
  }

  __device__ void find_places(const Step& step, int first, int (&places)[kStepTiles]) const {
#pragma unroll
    for (int tile = 0; tile < kStepTiles; ++tile) {
      places[tile] = box_.find_place(step.row, step.row.kv_len, first + tile * kKeys);
    }
  }

  __device__ void copy_tiles(const CUtensorMap& map, int kv_head, int first, const int (&places)[kStepTiles]) {
#pragma unroll
    for (int tile = 0; tile < kStepTiles; ++tile, ++turn_) {
      box_.copy_tile(shared_.tiles, turn_, map, kv_head, first + tile * kKeys, places[tile]);
    }
  }

  const StreamParams& params_;
  stream::Lane<kDim, kGroups>& shared_;
  BoxLane<Tile<kDim>, kKeys, /*kIsReadOnce=*/true> box_;
  unsigned turn_ = 0;
};

#endif

}  // namespace headway::cuda::stream
