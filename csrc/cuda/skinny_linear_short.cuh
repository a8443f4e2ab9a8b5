// The kernel of skinny_linear_short.cu, for large matrices with few rows a multiprocessor: a copy of one panel of 64
// columns would be too small for what a copy costs (skinny_linear_warpgroup.cuh), so one copy brings several of them.
// One warp has the copy engine stream the block's rows through a ring of such boxes, the tokens' panels beside them;
// the others multiply a box's columns side by side. The matrix does not depend on the previous kernel: as much of it as
// the ring holds is on its way while that one still runs.
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
#include "cuda/skinny_linear_short_copies.cuh"

namespace headway::cuda::skinny {

inline constexpr int kShortThreads = kShortWarps * kWarpSize;
inline constexpr int kStepColumns = wgmma::kPanelColumns / 2;  // of a warp's step
inline constexpr int kShortTileRows = 8;  // of the matrix, in a product

// Panels of 64 columns of a box: more where there are fewer rows, as a copy's cost is that of 10 KB.
template <int kTiles>
inline constexpr int kBoxPanels = kTiles <= 3 ? 8 : 4;

// The warps' sums of [token, row]; rows padded against conflicts of banks.
template <int kTokens, int kTiles>
using ShortSums = float[kShortWarps][kTokens][kTiles * kShortTileRows + 4];

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A multiplying warp. Lines are rows of 128 bytes of a box: its panels' rows, one panel after the other. kTokens: 8, or
// a multiple of 16. Beyond the block's rows and tokens the last one is multiplied again: those of a product never mix.
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
  static constexpr int kSteps = kBoxPanels<kTiles> * wgmma::kPanelColumns / kStepColumns / kShortWarps;  // of a box
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

  // The warp's columns of the box; after the last loads of them the slot is free.
  __device__ __forceinline__ void multiply(RingSlot slot) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = warp_ * kSteps + i;
      uint32_t rows[kTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        load_lines(rows[tile], weight_box(slot), step, work_.block_rows, kShortTileRows * tile);
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        uint32_t tokens[2][4] = {};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          load_lines(tokens[half], x_box(slot), step, work_.linear.num_tokens, 16 * group + 8 * half);
        }
        if (i == kSteps - 1 && group == kGroups - 1) release(slot);
        multiply_tiles(sums_[group], tokens, rows);
      }
    }
  }

  // The step's columns of lines first .. first + 7 of its panel, as four tiles of 8 columns.
  __device__ __forceinline__ void load_lines(uint32_t (&tiles)[4], uint32_t box, int step, int panel_lines,
                                             int first) const {
    const int line = step / 2 * panel_lines + min(first + lane_ % 8, panel_lines - 1);
    const int piece = step % 2 * 4 + lane_ / 8;
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
