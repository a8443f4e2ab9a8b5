// What the roles of moe_warpgroup.cuh share: the ring of panels of 64 columns, which rows of the experts' matrices are
// the block's, and in which order it goes through them.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/tensor_map.cuh"
#include "cuda/common/wgmma_narrow.cuh"
#include "cuda/moe_pairs.cuh"
#include "cuda/skinny_linear_ring.cuh"

namespace headway::cuda::moe {

using skinny::Barriers;
using skinny::RingSlot;

inline constexpr int kGroups = 2;  // of warps that multiply
inline constexpr int kGroupThreads = 128;
inline constexpr int kProductThreads = kGroups * kGroupThreads;
inline constexpr int kCopyThreads = 128;
inline constexpr int kPanelThreads = kProductThreads + kCopyThreads;
inline constexpr int kGroupRows = 64;  // of a panel, in a warpgroup's products and a box of the copy engine
inline constexpr int kMostChunkPairs = 64;  // of an expert, multiplied together
inline constexpr int kBoxBytes = kGroupRows * wgmma::kPanelRowBytes;
inline constexpr int kWeightBytes = kGroups * kBoxBytes;

// The experts' outputs, of the first product features, of the second channels, are cut into tiles of two parts, each a
// box of the weights. Blocks take the tiles of all touched experts in turn: neighbouring ones at the same time, which
// memory answers a tenth sooner than as many streams far apart.
struct PanelWork {
  MoeExpertsParams experts;
  CUtensorMap weight;  // boxes of kGroupRows rows: with gates, 8 of them before the 8 that they belong to
  int columns;
  int outputs;  // of an expert
  int part_outputs;
  int num_tiles;  // of an expert
  int chunk_pairs;  // at most kMostChunkPairs
  int stage_bytes;  // of the ring: two boxes, and a row for each pair of a chunk
  int num_stages;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct PanelItem {
  ExpertPairs chunk;
  int first_output;
  int num_outputs;
  int num_parts;
  bool is_read_once;  // the weights: no other chunk of the expert's pairs comes after this one
};

// What both roles share.
class PanelRing {
 public:
  __device__ PanelRing(const PanelWork& work, const PairTable& table, Barriers& barriers, unsigned char* stages)
      : work_(work),
        table_(table),
        full_(shared_address(barriers.full)),
        free_(shared_address(barriers.free)),
        stages_(shared_address(stages)),
        num_panels_((work.columns + wgmma::kPanelColumns - 1) / wgmma::kPanelColumns) {}

  __device__ void init() const {
    for (int i = 0; i < work_.num_stages; ++i) {
      full({i, 0}).init(1 + kCopyThreads);
      free({i, 0}).init(kProductThreads / kWarpSize);
    }
    Barrier::publish_inits();
  }

 protected:
  __device__ __forceinline__ Barrier full(RingSlot slot) const { return {full_ + 8 * slot.index}; }
  __device__ __forceinline__ Barrier free(RingSlot slot) const { return {free_ + 8 * slot.index}; }
  __device__ __forceinline__ uint32_t weight_panel(RingSlot slot) const {
    return stages_ + slot.index * work_.stage_bytes;
  }
  __device__ __forceinline__ uint32_t token_panel(RingSlot slot) const { return weight_panel(slot) + kWeightBytes; }

  // Calls body(item) for the block's items in order, until it returns false.
  template <typename Body>
  __device__ __forceinline__ void for_items(Body&& body) const {
    const int num_items = *table_.num_touched * work_.num_tiles;
    for (auto idx = static_cast<int>(blockIdx.x); idx < num_items; idx += static_cast<int>(gridDim.x)) {
      const ExpertPairs all = table_.touched[idx / work_.num_tiles];
      PanelItem item{all, idx % work_.num_tiles * kGroups * work_.part_outputs, 0, 0, all.count <= work_.chunk_pairs};
      item.num_outputs = min(kGroups * work_.part_outputs, work_.outputs - item.first_output);
      item.num_parts = item.num_outputs > work_.part_outputs ? kGroups : 1;
      for (int begin = 0; begin < all.count; begin += work_.chunk_pairs) {
        item.chunk = all.chunk(begin, work_.chunk_pairs);
        if (!body(item)) return;
      }
    }
  }

  const PanelWork& work_;
  const PairTable& table_;
  uint32_t full_;
  uint32_t free_;
  uint32_t stages_;
  int num_panels_;  // of an item
};

#endif

}  // namespace headway::cuda::moe
