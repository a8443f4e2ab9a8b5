// The kernel of skinny_linear_warpgroup.cu: one warp has the copy engine stream the block's rows of the matrix through
// a ring of panels of 64 columns, one warpgroup multiplies them. The matrix does not depend on the previous kernel: as
// much of it as the ring holds is on its way while that one still runs. Few threads with few registers, so that the
// short kernels between two products find room beside it.
//
// A sum runs over the columns in order, in one accumulator: its bits depend on the row and the token alone.
#pragma once

#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/tensor_map.cuh"
#include "cuda/common/wgmma_narrow.cuh"
#include "cuda/skinny_linear_ring.cuh"
#include "params/linear.h"

namespace headway::cuda::skinny {

inline constexpr int kGroupWarps = 4;
inline constexpr int kGroupThreads = kGroupWarps * kWarpSize;
inline constexpr int kThreads = kGroupThreads + kWarpSize;  // the last warp copies
inline constexpr int kTileRows = 64;  // of one product
inline constexpr int kMaxRowTiles = 4;  // of a group of rows: a box of the copy engine has at most 256 rows

struct WarpgroupWork {
  SkinnyLinearParams linear;
  CUtensorMap weight;  // boxes of group_rows rows
  CUtensorMap x;  // boxes of as many tokens as a product has columns
  int group_rows;  // of the matrix, at once
  int num_groups;  // of a block
  int num_stages;  // of the ring
  int weight_bytes;  // of a stage, padded to the swizzle's 1,024; x follows
  int stage_bytes;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What both roles share.
class BlockRing {
 public:
  __device__ BlockRing(const WarpgroupWork& work, Barriers& barriers, unsigned char* stages)
      : work_(work),
        full_(shared_address(barriers.full)),
        free_(shared_address(barriers.free)),
        stages_(shared_address(stages)) {
    const int rows = work.linear.num_outputs;
    first_row_ = static_cast<int>(blockIdx.x) * work.num_groups * work.group_rows;
    num_groups_ = min(work.num_groups, (rows - first_row_ + work.group_rows - 1) / work.group_rows);
    num_panels_ = (work.linear.num_inputs + wgmma::kPanelColumns - 1) / wgmma::kPanelColumns;
  }

  __device__ void init() const {
    for (int i = 0; i < work_.num_stages; ++i) {
      full({i, 0}).init(1);
      free({i, 0}).init(kGroupWarps);
    }
    Barrier::publish_inits();
  }

  __device__ __forceinline__ Barrier full(RingSlot slot) const { return {full_ + 8 * slot.index}; }
  __device__ __forceinline__ Barrier free(RingSlot slot) const { return {free_ + 8 * slot.index}; }
  __device__ __forceinline__ uint32_t weight_panel(RingSlot slot) const {
    return stages_ + slot.index * work_.stage_bytes;
  }
  __device__ __forceinline__ uint32_t x_panel(RingSlot slot) const { return weight_panel(slot) + work_.weight_bytes; }

 protected:
  const WarpgroupWork& work_;
  uint32_t full_;
  uint32_t free_;
  uint32_t stages_;
  int first_row_;  // of the block
  int num_groups_;
  int num_panels_;  // of a group
};

// The copying thread.
template <int kTokens>
class Copies : BlockRing {
 public:
  __device__ explicit Copies(const BlockRing& ring) : BlockRing(ring) {}

  __device__ void run() const {
    const int num_turns = num_groups_ * num_panels_;
    const int num_early = min(num_turns, work_.num_stages);
    RingSlot slot;
    for (int turn = 0; turn < num_early; ++turn) copy_weight({turn, 0}, turn);
    wait_for_previous_kernel();
    for (int turn = 0; turn < num_early; ++turn, slot.advance(work_.num_stages)) copy_x(slot, turn);
    for (int turn = num_early; turn < num_turns; ++turn, slot.advance(work_.num_stages)) {
      free(slot).wait(slot.parity ^ 1);
      copy_weight(slot, turn);
      copy_x(slot, turn);
    }
  }

 private:
  __device__ __forceinline__ int column(int turn) const { return turn % num_panels_ * wgmma::kPanelColumns; }
  __device__ __forceinline__ int row(int turn) const { return first_row_ + turn / num_panels_ * work_.group_rows; }

  __device__ __forceinline__ void copy_weight(RingSlot slot, int turn) const {
    full(slot).arrive_expecting((work_.group_rows + kTokens) * wgmma::kPanelRowBytes);
    const int indices[4] = {column(turn), row(turn), 0, 0};
    copy_box(weight_panel(slot), work_.weight, indices, full(slot));
  }
  __device__ __forceinline__ void copy_x(RingSlot slot, int turn) const {
    const int indices[4] = {column(turn), 0, 0, 0};
    copy_box(x_panel(slot), work_.x, indices, full(slot));
  }
};

// The multiplying warpgroup.
template <typename T, int kTokens, int kRowTiles>
class Products : BlockRing {
 public:
  __device__ explicit Products(const BlockRing& ring) : BlockRing(ring) {}

  __device__ void run() {
    wait_for_previous_kernel();
    for (int group = 0; group < num_groups_; ++group) {
      multiply_group();
      write_group(first_row_ + group * work_.group_rows);
    }
  }

 private:
  static constexpr int kColumnTiles = kTokens / 8;

  // A panel's slot is free once the next panel's products are under way and its own are over.
  __device__ __forceinline__ void multiply_group() {
    RingSlot last;
    for (int panel = 0; panel < num_panels_; ++panel) {
      full(slot_).wait(slot_.parity);
      multiply_panel(panel > 0);
      if (panel > 0) {
        wgmma::wait_products<1>();
        release(last);
      }
      last = slot_;
      slot_.advance(work_.num_stages);
    }
    wgmma::wait_products<0>();
#pragma unroll
    for (auto& tile : sums_) wgmma::hold(tile);
    release(last);
  }

  // Rows of a tile beyond the group's are whatever lies behind them: rows of a product never mix.
  __device__ __forceinline__ void multiply_panel(bool accumulates) {
    constexpr int kTileBytes = kTileRows * wgmma::kPanelRowBytes;
    constexpr int kStep = wgmma::kStepBytes<wgmma::Rows::kAlongSum>;
    const uint64_t weight = wgmma::describe(weight_panel(slot_));
    const uint64_t x = wgmma::describe(x_panel(slot_));
    wgmma::begin_products();
#pragma unroll
    for (int k = 0; k < wgmma::kPanelRowBytes / kStep; ++k) {
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        wgmma::multiply_shared_narrow<T>(sums_[tile], weight + ((tile * kTileBytes + k * kStep) >> 4),
                                         x + (k * kStep >> 4), accumulates || k > 0);
      }
    }
    wgmma::commit_products();
  }

  __device__ __forceinline__ void release(RingSlot slot) const {
    if (threadIdx.x % kWarpSize == 0) free(slot).arrive();
  }

  __device__ __forceinline__ void write_group(int first_row) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int num_rows = min(work_.group_rows, work_.linear.num_outputs - first_row);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * kTileRows + warp * 16 + half * 8 + lane / 4;
        if (row >= num_rows) continue;
#pragma unroll
        for (int column = 0; column < kColumnTiles; ++column) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            write(first_row + row, 8 * column + lane % 4 * 2 + i, sums_[tile][column][2 * half + i]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void write(int row, int token, float sum) const {
    const SkinnyLinearParams& params = work_.linear;
    if (token >= params.num_tokens) return;
    if (params.bias != nullptr) sum += to_float(static_cast<const T*>(params.bias)[row]);
    T* out = static_cast<T*>(params.out) + token * params.out_stride + row;
    if (params.is_added) sum += to_float(*out);
    *out = from_float<T>(sum);
  }

  RingSlot slot_;
  float sums_[kRowTiles][kColumnTiles][4];
};

#endif

template <typename T, int kTokens, int kRowTiles>
__global__ void __launch_bounds__(kThreads, 1) warpgroup_linear_kernel(const __grid_constant__ WarpgroupWork work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char stages[];
  __shared__ Barriers barriers;
  const BlockRing ring(work, barriers, stages);
  allow_next_kernel();
  if (threadIdx.x == 0) ring.init();
  if (threadIdx.x == kGroupThreads) {
    prefetch_tensor_map(work.weight);
    prefetch_tensor_map(work.x);
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    Products<T, kTokens, kRowTiles>(ring).run();
  } else {
    if (threadIdx.x == kGroupThreads) Copies<kTokens>(ring).run();
    wait_for_previous_kernel();
  }
#endif
}

}  // namespace headway::cuda::skinny
