// Attention for rows of few queries on warpgroup products (sm_90a): what a block's warps share. One warp has the copy
// engine fetch the keys and values of the block's piece of the list (attention_decode.cuh) into a deep ring of tiles
// (attention_stream_copies.cuh); a warpgroup for every 64 packed rows multiplies and folds them in registers
// (attention_stream_rows.cuh). Most of the 64 rows may be empty: reading the keys takes longer than their products.
//
// The tree: the 128 keys of a step are weighed together and summed in order.
#pragma once

#include "cuda/attention_decode.cuh"
#include "cuda/attention_panels.cuh"

namespace headway::cuda::stream {

inline constexpr int kGroupThreads = 128;
inline constexpr int kGroupWarps = kGroupThreads / kWarpSize;
inline constexpr int kKeys = 64;  // of a tile
inline constexpr int kStepTiles = kStreamStepKeys / kKeys;
static_assert(kStepTiles == 2);

// Of a block: warpgroups that compute, and one whose warps copy.
inline constexpr int kThreads = (kMaxStreamGroups + 1) * kGroupThreads;

// Registers a thread: 65,536 in all, and the copies need few.
inline constexpr int kRowRegisters = 232;
inline constexpr int kCopyRegisters = 40;

// Of a block: a step's keys and values a lane. With less the memory idles, with more its reads get in each other's way.
inline constexpr int kRingBytes = 128 << 10;
constexpr unsigned num_stages(int dim, int num_groups) {
  return static_cast<unsigned>(kRingBytes / kMaxStreamGroups * num_groups / (kKeys * dim * 2));
}

struct StreamParams {
  DecodeParams decode;
  CUtensorMap keys;  // [num_blocks, S, Hkv, D]
  CUtensorMap values;  // the same
  int box_keys;  // copied at once; divides the cache's block size and kKeys
  int num_chains;  // that a block has in shared memory: one a warpgroup, or one, or none
  int chain_octets;  // of each
};

// A lane's piece of the list: the list's blocks are lanes here, but where lanes take turns.
struct Piece {
  StepList list;
  const int32_t* prefix;
  int index;
  int begin;
  int end;
  int lane;  // of the block

  __device__ bool takes_turns() const { return list.cuts == Cuts::kTurns; }
  // Whether the lane takes the span of this number among the spans of the piece's rows.
  __device__ bool takes(int span) const { return !takes_turns() || span % kMaxStreamGroups == lane; }

  // End of the steps that follow `step`, at `index`, in its row, key head and part.
  __device__ int end_of_run(const Step& step, int index) const {
    return min(end, index + step.all.count - step.position);
  }
};

template <int kDim>
using Tile = KeyTile<kDim, kKeys>;

// Of the kGroups warpgroups that share keys, and the warp that copies them.
template <int kDim, int kGroups>
struct Lane {
  Panels<kDim, kStreamRows> queries[kGroups];
  Ring<Tile<kDim>, num_stages(kDim, kGroups), kGroups * kGroupWarps> tiles;  // of a step the keys, then the values
  uint64_t turn;  // comes when the other lane's threads have left the chain of the span before
  Piece piece;
  Step steps[kGroups];  // the first of those of one row and key head that a warpgroup is at
};

template <int kDim, int kGroups>
struct Shared {
  Lane<kDim, kGroups> lanes[kMaxStreamGroups / kGroups];
};  // then the prefix sums of the rows' steps, then chains

}  // namespace headway::cuda::stream
