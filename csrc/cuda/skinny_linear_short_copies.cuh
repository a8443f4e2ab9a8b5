// The ring of boxes of skinny_linear_short.cuh, and the thread that fills it.
#pragma once

#include "cuda/common/chained.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/tensor_map.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/skinny_linear_ring.cuh"
#include "params/linear.h"

namespace headway::cuda::skinny {

inline constexpr int kShortWarps = 8;  // that multiply
inline constexpr int kLineBytes = wgmma::kPanelRowBytes;

struct ShortWork {
  SkinnyLinearParams linear;
  CUtensorMap weight;  // [panel, row, column of the panel]; boxes of block_rows rows
  CUtensorMap x;  // [panel, token, column of the panel]; boxes of all tokens
  int block_rows;
  int box_panels;
  int num_stages;  // of the ring
  int weight_bytes;  // of a stage, padded to the swizzle's 1,024; x follows
  int stage_bytes;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What both roles share.
class ShortRing {
 public:
  __device__ ShortRing(const ShortWork& work, Barriers& barriers, unsigned char* stages)
      : work_(work),
        full_(shared_address(barriers.full)),
        free_(shared_address(barriers.free)),
        stages_(shared_address(stages)),
        first_row_(static_cast<int>(blockIdx.x) * work.block_rows) {
    const int box_columns = work.box_panels * wgmma::kPanelColumns;
    num_turns_ = (work.linear.num_inputs + box_columns - 1) / box_columns;
  }

  __device__ void init() const {
    for (int i = 0; i < work_.num_stages; ++i) {
      full({i, 0}).init(1);
      free({i, 0}).init(kShortWarps);
    }
    Barrier::publish_inits();
  }

 protected:
  __device__ __forceinline__ Barrier full(RingSlot slot) const { return {full_ + 8 * slot.index}; }
  __device__ __forceinline__ Barrier free(RingSlot slot) const { return {free_ + 8 * slot.index}; }
  __device__ __forceinline__ uint32_t weight_box(RingSlot slot) const {
    return stages_ + slot.index * work_.stage_bytes;
  }
  __device__ __forceinline__ uint32_t x_box(RingSlot slot) const { return weight_box(slot) + work_.weight_bytes; }

  const ShortWork& work_;
  uint32_t full_;
  uint32_t free_;
  uint32_t stages_;
  int first_row_;  // of the block
  int num_turns_;  // boxes
};

// The copying thread.
class ShortCopies : ShortRing {
 public:
  __device__ explicit ShortCopies(const ShortRing& ring) : ShortRing(ring) {}

  __device__ void run() const {
    const int num_early = min(num_turns_, work_.num_stages);
    RingSlot slot;
    for (int turn = 0; turn < num_early; ++turn) copy_weight({turn, 0}, turn);
    wait_for_previous_kernel();
    for (int turn = 0; turn < num_early; ++turn, slot.advance(work_.num_stages)) copy_x(slot, turn);
    for (int turn = num_early; turn < num_turns_; ++turn, slot.advance(work_.num_stages)) {
      free(slot).wait(slot.parity ^ 1);
      copy_weight(slot, turn);
      copy_x(slot, turn);
    }
  }

 private:
  // Panels beyond the last are zeros, and count as bytes too.
  __device__ __forceinline__ void copy_weight(RingSlot slot, int turn) const {
    full(slot).arrive_expecting((work_.block_rows + work_.linear.num_tokens) * work_.box_panels * kLineBytes);
    const int indices[4] = {0, first_row_, turn * work_.box_panels, 0};
    copy_box(weight_box(slot), work_.weight, indices, full(slot));
  }
  __device__ __forceinline__ void copy_x(RingSlot slot, int turn) const {
    const int indices[4] = {0, 0, turn * work_.box_panels, 0};
    copy_box(x_box(slot), work_.x, indices, full(slot));
  }
};

#endif

}  // namespace headway::cuda::skinny
