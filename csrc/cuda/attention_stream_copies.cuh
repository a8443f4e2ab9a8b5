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
  __device__ void copy_run(const Step& step, int count) {
    if (!shared_.piece.takes_turns()) return copy_steps(step, step.position, count);
    for (int position = 0; position < count; position += kSpanSteps, ++num_spans_) {
      if (shared_.piece.takes(num_spans_)) copy_steps(step, position, min(kSpanSteps, count - position));
    }
  }

  // Keys and values of `count` steps from this one of the row on.
  __device__ void copy_steps(const Step& step, int position, int count) {
    const int begin = position * kStreamStepKeys;
    const int end = begin + count * kStreamStepKeys;
    int places[kStepTiles];
    find_places(step, begin, places);
    for (int first = begin; first < end; first += kStreamStepKeys) {
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
  int num_spans_ = 0;  // of the piece, so far
};

#endif

}  // namespace headway::cuda::stream
