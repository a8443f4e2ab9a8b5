// The kernel of skinny_linear_short.cu, for large matrices with few rows a multiprocessor: a copy of one panel of 64
// columns would be too small for what a copy costs (skinny_linear_warpgroup.cuh), so one copy brings kBoxPanels of
// them. One warp has the copy engine stream the block's rows through a ring of such boxes, the tokens' panels beside
// them; each of the others multiplies half a panel of a box. The matrix does not depend on the previous kernel: as much
// of it as the ring holds is on its way while that one still runs.
//
// A sum is that of the warps' sums in order, each over the warp's panels in order: its bits depend on the row and the
// token alone.
#pragma once

#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/tensor_map.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/skinny_linear_ring.cuh"
#include "params/linear.h"

namespace headway::cuda::skinny {

inline constexpr int kBoxPanels = 4;  // of 64 columns
inline constexpr int kShortWarps = 2 * kBoxPanels;  // that multiply, half a panel each
inline constexpr int kShortThreads = kShortWarps * kWarpSize;
inline constexpr int kShortTileRows = 8;  // of the matrix, in a product
inline constexpr int kLineBytes = wgmma::kPanelRowBytes;

struct ShortWork {
  SkinnyLinearParams linear;
  CUtensorMap weight;  // [panel, row, column of the panel]; boxes of block_rows rows
  CUtensorMap x;  // [panel, token, column of the panel]; boxes of all tokens
  int block_rows;
  int num_stages;  // of the ring
  int weight_bytes;  // of a stage, padded to the swizzle's 1,024; x follows
  int stage_bytes;
};

// The warps' sums of [token, row]; rows padded against conflicts of banks.
template <int kTokens, int kTiles>
using ShortSums = float[kShortWarps][kTokens][kTiles * kShortTileRows + 4];

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
    constexpr int kBoxColumns = kBoxPanels * wgmma::kPanelColumns;
    num_turns_ = (work.linear.num_inputs + kBoxColumns - 1) / kBoxColumns;
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
    full(slot).arrive_expecting((work_.block_rows + work_.linear.num_tokens) * kBoxPanels * kLineBytes);
    const int indices[4] = {0, first_row_, turn * kBoxPanels, 0};
    copy_box(weight_box(slot), work_.weight, indices, full(slot));
  }
  __device__ __forceinline__ void copy_x(RingSlot slot, int turn) const {
    const int indices[4] = {0, 0, turn * kBoxPanels, 0};
    copy_box(x_box(slot), work_.x, indices, full(slot));
  }
};

// A multiplying warp. Lines are rows of 128 bytes of a box: its panels' rows, one panel after the other. kTokens: 8, or
// a multiple of 16. Rows and tokens beyond the block's are whatever lies behind them: those of a product never mix.
template <typename T, int kTokens, int kTiles>
class ShortProducts : ShortRing {
 public:
  using Sums = ShortSums<kTokens, kTiles>;

  __device__ explicit ShortProducts(const ShortRing& ring)
      : ShortRing(ring),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize),
        num_rows_(min(work_.block_rows, work_.linear.num_outputs - first_row_)) {}

  // What the products are added to is fetched before them.
  __device__ void run() {
    wait_for_previous_kernel();
    load_addends();
#pragma unroll
    for (auto& group : sums_) {
#pragma unroll
      for (auto& sum : group) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
    }
    RingSlot slot;
    for (int turn = 0; turn < num_turns_; ++turn, slot.advance(work_.num_stages)) {
      full(slot).wait(slot.parity);
      multiply(slot);
    }
  }

  __device__ void store(Sums& warp_sums) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        float* target = &warp_sums[warp_][group * 16 + half * 8 + lane_ / 4][lane_ % 4 * 2];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const float (&sum)[4] = sums_[group][tile];
          *reinterpret_cast<float2*>(target + kShortTileRows * tile) = make_float2(sum[2 * half], sum[2 * half + 1]);
        }
      }
    }
  }

  __device__ void write(const Sums& warp_sums) const {
    const SkinnyLinearParams& params = work_.linear;
    for_each_output([&](int i, int token, int row) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kShortWarps; ++warp) sum += warp_sums[warp][token][row];
      sum += to_float(biases_[i]);
      sum += to_float(addends_[i]);
      static_cast<T*>(params.out)[token * params.out_stride + first_row_ + row] = from_float<T>(sum);
    });
  }

 private:
  static constexpr int kGroups = (kTokens + 15) / 16;  // of tokens, of a product
  static constexpr int kHalves = kTokens < 16 ? 1 : 2;  // of a group
  static constexpr int kOutputs =
      (kTokens * kTiles * kShortTileRows + kShortThreads - 1) / kShortThreads;  // of a thread

  // visit(index among the thread's, token, row of the block)
  template <typename Visit>
  __device__ __forceinline__ void for_each_output(Visit&& visit) const {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int output = i * kShortThreads + static_cast<int>(threadIdx.x);
      if (output < num_rows_ * work_.linear.num_tokens) visit(i, output / num_rows_, output % num_rows_);
    }
  }

  __device__ void load_addends() {
    const SkinnyLinearParams& params = work_.linear;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) biases_[i] = addends_[i] = from_float<T>(0.0f);
    for_each_output([&](int i, int token, int row) {
      if (params.bias != nullptr) biases_[i] = static_cast<const T*>(params.bias)[first_row_ + row];
      if (!params.is_added) return;
      addends_[i] = static_cast<const T*>(params.out)[token * params.out_stride + first_row_ + row];
    });
  }

  // The warp's 32 columns of the box; after the last loads of them the slot is free.
  __device__ __forceinline__ void multiply(RingSlot slot) {
    const int panel = warp_ / 2;
    uint32_t rows[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      load_lines(rows[tile], weight_box(slot), panel * work_.block_rows + kShortTileRows * tile);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t tokens[2][4] = {};
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        load_lines(tokens[half], x_box(slot), panel * work_.linear.num_tokens + 16 * group + 8 * half);
      }
      if (group == kGroups - 1) release(slot);
      multiply_tiles(sums_[group], tokens, rows);
    }
  }

  // The warp's half of lines first .. first + 7, as four tiles of 8 columns.
  __device__ __forceinline__ void load_lines(uint32_t (&tiles)[4], uint32_t box, int first) const {
    const int line = first + lane_ % 8;
    const int piece = warp_ % 2 * 4 + lane_ / 8;
    load_matrices(tiles, box + line * kLineBytes + ((piece ^ (line & 7)) << 4));
  }

  __device__ __forceinline__ static void multiply_tiles(float (&sums)[kTiles][4], const uint32_t (&tokens)[2][4],
                                                        const uint32_t (&rows)[kTiles][4]) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t operand[4] = {tokens[0][2 * step], tokens[1][2 * step], tokens[0][2 * step + 1],
                                   tokens[1][2 * step + 1]};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_add<T>(sums[tile], operand, rows[tile][2 * step], rows[tile][2 * step + 1]);
      }
    }
  }

  __device__ __forceinline__ void release(RingSlot slot) const {
    __syncwarp();
    if (lane_ == 0) free(slot).arrive();
  }

  int lane_;
  int warp_;
  int num_rows_;  // of the block
  T biases_[kOutputs];
  T addends_[kOutputs];
  float sums_[kGroups][kTiles][4];
};

#endif

template <typename T, int kTokens, int kTiles>
__global__ void __launch_bounds__(kShortThreads + kWarpSize, 1)
    short_linear_kernel(const __grid_constant__ ShortWork work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char stages[];
  __shared__ Barriers barriers;
  const ShortRing ring(work, barriers, stages);
  allow_next_kernel();
  if (threadIdx.x == 0) ring.init();
  if (threadIdx.x == kShortThreads) {
    prefetch_tensor_map(work.weight);
    prefetch_tensor_map(work.x);
  }
  __syncthreads();
  if (threadIdx.x >= kShortThreads) {
    if (threadIdx.x == kShortThreads) ShortCopies(ring).run();
    wait_for_previous_kernel();
    __syncwarp();
    __syncthreads();
    __syncthreads();
    return;
  }
  using Products = ShortProducts<T, kTokens, kTiles>;
  Products products(ring);
  products.run();
  __syncthreads();  // the ring is no longer read: its place is the sums'
  auto& warp_sums = *reinterpret_cast<typename Products::Sums*>(stages);
  products.store(warp_sums);
  __syncthreads();
  products.write(warp_sums);
#endif
}

}  // namespace headway::cuda::skinny
