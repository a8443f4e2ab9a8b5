// A stretch of a slot's log folded into its state, by warps that have 16 channels of it each in their registers
// (state_tile.cuh). What the products take is copied past the registers: they are the state's.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/state_window.cuh"

namespace headway::cuda {

inline constexpr int kFoldWarps = 4;  // a block at most, where not said otherwise

// Warps of a block whose channels are of one group, at most `wanted`.
inline int choose_fold_warps(int group_tiles, int wanted) {
  int warps = 1;
  for (int count = 2; count <= wanted; ++count) {
    if (group_tiles % count == 0) warps = count;
  }
  return warps;
}

// A stretch's inputs: B of the block's group, the rest each warp's own.
template <typename T, int kN, int kWarps = kFoldWarps>
struct FoldMemory {
  alignas(16) T B[kMaxWindow * kN];  // input_offset says where
  alignas(16) T x[kWarps][kMaxWindow * kTileChannels];
  T raw_dt[kWarps][kMaxWindow];
  float dt_bias[kWarps];
  float A[kWarps];
};

// Positions begin .. begin + count - 1 of a slot's log, which lie in one window. A block's warps, whose channels are of
// one group, all copy and all apply; between an apply and the next copy is a barrier.
template <typename T, int kN, int kWarps, typename Params>
class StretchFold {
 public:
  __device__ __forceinline__ StretchFold(const Params& params, const StateChannels& channels, int begin, int count,
                                         FoldMemory<T, kN, kWarps>& memory)
      : params_(params), channels_(channels), log_(params, channels.slot, begin, 0), count_(count), memory_(memory) {}

  // Starts the copies; ends a group of them.
  __device__ __forceinline__ void copy() const {
    const T raw_dt =
        *log_dt<T>(params_, channels_.slot, static_cast<int>(log_.entry(nearest(lane() % kMaxWindow))), channels_.head);
    copy_x();
    if (lane() == 0) copy_word_async(shared_address(&memory_.A[warp()]), params_.A + channels_.head, true);
    if (lane() == 1) copy_word_async(shared_address(&memory_.dt_bias[warp()]), params_.dt_bias + channels_.head, true);
    copy_B();
    commit_copies();
    if (lane() < kMaxWindow) memory_.raw_dt[warp()][lane()] = raw_dt;  // two bytes are too few for a copy of their own
  }

  // When all of a thread's copies have landed.
  __device__ __forceinline__ void apply(StateTile<kN>& state) const {
    wait_copies<0>();
    __syncthreads();
    const Stretch stretch(step_size(params_, memory_.raw_dt[warp()][lane() % kMaxWindow], memory_.dt_bias[warp()]),
                          count_, memory_.A[warp()]);
    uint32_t factors[kFactorTerms][4];
    weigh_factors(memory_.x[warp()], stretch.weight(), factors);
    state.fold(expf(stretch.total), factors, memory_.B);
  }

 private:
  static constexpr int kPerWord = static_cast<int>(sizeof(uint32_t) / sizeof(T));

  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }

  __device__ __forceinline__ bool is_inside(int input) const { return input < count_; }
  __device__ __forceinline__ int nearest(int input) const { return min(input, count_ - 1); }

  __device__ __forceinline__ void copy_x() const {
    constexpr int kWidth = kVectorWidth<T>;
    constexpr int kPieces = kTileChannels / kWidth;
#pragma unroll
    for (int i = 0; i < kMaxWindow * kPieces / kWarpSize; ++i) {
      const int index = i * kWarpSize + lane();
      const int input = index / kPieces;
      const T* source = log_.at(nearest(input)) + channels_.first + index % kPieces * kWidth;
      copy_async(shared_address(memory_.x[warp()] + index * kWidth), source, is_inside(input));
    }
  }

  // By words, for the products' columns part what lies together.
  __device__ __forceinline__ void copy_B() const {
    constexpr int kWarpStates = kWarpSize * kPerWord;
    const int n = lane() * kPerWord;
    const int column = column_of(n);
    const int64_t channel = inner_channels(params_) + static_cast<int64_t>(channels_.group) * kN + n;
#pragma unroll 1
    for (int input = warp(); input < kMaxWindow; input += static_cast<int>(blockDim.x) / kWarpSize) {
      const T* source = log_.at(nearest(input)) + channel;
      const uint32_t target = shared_address(memory_.B + input_offset<T, kN>(input, column));
#pragma unroll
      for (int first = 0; first < kN; first += kWarpStates) {
        copy_word_async(target + first * static_cast<int>(sizeof(T)), source + first, is_inside(input));
      }
    }
  }

  const Params& params_;
  const StateChannels& channels_;
  LogWalk<T> log_;
  int count_;
  FoldMemory<T, kN, kWarps>& memory_;
};

}  // namespace headway::cuda
