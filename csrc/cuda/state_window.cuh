// A slot's state over a window, as a warp works on 16 channels of it in its registers (state_tile.cuh), and the inputs
// since.
//
//   S_e = exp(A sum(dt)) S_b + sum_j exp(A sum_{k > j} dt_k) dt_j x_j B_j^T          (fold, arXiv 2405.21060:
//                                                                                     state_fold.cuh)
//   y_t = exp(A sum(dt)) S_b C_t + sum_{j <= t} exp(A sum_{j < k <= t} dt_k) dt_j (B_j . C_t) x_j + D x_t  (read out)
//
// Sums run from a canonical base on (core/state_base.h), so that their order depends on positions alone. Several
// kernels make the same numbers: where a product meets a sum, the code says whether both are rounded.
#pragma once

#include <type_traits>

#include "cuda/common/math.cuh"
#include "cuda/common/reciprocal.cuh"
#include "cuda/mamba_decode.h"
#include "cuda/state_tile.cuh"

namespace headway::cuda {

static_assert(kTileInputs == kMaxWindow);

// 16 channels of a slot, all of one head.
struct StateChannels {
  int64_t slot;
  int first;  // of H * P
  int head;
  int group;
};

// A row's channels by 16.
struct RowTiles {
  int count;
  int group_count;
  Reciprocal of_head;
  Reciprocal of_group;

  template <typename Params>
  explicit RowTiles(const Params& params)
      : count(params.num_heads * (params.head_dim / kTileChannels)),
        group_count(count / params.num_groups),
        of_head(params.head_dim / kTileChannels),
        of_group(group_count) {}

  __device__ __forceinline__ StateChannels channels(int64_t slot, int tile) const {
    return {slot, tile * kTileChannels, of_head.divide(tile), of_group.divide(tile)};
  }
};

template <typename T, typename Params>
__device__ __forceinline__ float step_size(const Params& params, T raw, float bias) {
  return fminf(fmaxf(softplus(to_float(raw) + bias), params.dt_min), params.dt_max);
}

// Lane l's entry of a stretch of `count` <= kMaxWindow tokens; dt is the lane's step size. Each half of a warp has a
// stretch of its own.
struct Stretch {
  float dt;      // 0 beyond the stretch
  float before;  // A sum(dt) up to and with the entry
  float total;   // A sum(dt) of the stretch

  __device__ __forceinline__ Stretch(float lane_dt, int count, float A) {
    const int lane = static_cast<int>(threadIdx.x) % kMaxWindow;
    dt = lane < count ? lane_dt : 0.0f;
    float sum = dt;
#pragma unroll
    for (int offset = 1; offset < kMaxWindow; offset *= 2) {
      const float other = __shfl_up_sync(kFullWarp, sum, offset, kMaxWindow);
      if (lane >= offset) sum += other;
    }
    before = __fmul_rn(A, sum);
    total = __shfl_sync(kFullWarp, before, count - 1, kMaxWindow);
  }

  // Weight of the lane's input at the end of the stretch; 0 beyond.
  __device__ __forceinline__ float weight() const { return __fmul_rn(dt, expf(total - before)); }
};

// Half a warp writes a token's row of the table, the token being the stretch's last: lane k brings B_k . C.
__device__ __forceinline__ void store_weights(const Stretch& stretch, int count, float score, float D, float* table) {
  const int lane = static_cast<int>(threadIdx.x % kMaxWindow);
  float weight = lane < count ? __fmul_rn(stretch.weight(), score) : 0.0f;
  if (lane == count - 1) weight += D;
  table[lane] = weight;
  if (lane < kTableWidth - kMaxWindow) table[kMaxWindow + lane] = lane == 0 ? expf(stretch.total) : 0.0f;
}

// B . C of inputs in shared memory, which lanes read as one piece each.
template <int kN, typename T>
__device__ __forceinline__ float warp_dot(const T* B, const T* C) {
  constexpr int kWidth = kN / kWarpSize;
  const int first = static_cast<int>(threadIdx.x % kWarpSize) * kWidth;
  float b[kWidth];
  float c[kWidth];
  load_floats(B + first, b);
  load_floats(C + first, c);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum = fmaf(b[i], c[i], sum);
  return warp_sum(sum);
}

// Where the window that holds `position` ends.
__device__ __forceinline__ int window_end(int position) {
  return position / kMaxWindow * kMaxWindow + kMaxWindow;
}

// A slot's log of x and B from a position on, at a channel.
template <typename T>
class LogWalk {
 public:
  template <typename Params>
  __device__ __forceinline__ LogWalk(const Params& params, int64_t slot, int position, int64_t channel)
      : first_(static_cast<unsigned>(position) % static_cast<unsigned>(params.log.num_entries)),
        num_entries_(static_cast<unsigned>(params.log.num_entries)),
        width_(static_cast<unsigned>((inner_channels(params) + group_states(params)) * sizeof(T))),
        source_(reinterpret_cast<char*>(log_column<T>(params, slot, 0, channel))) {}

  // The place of the index-th position, index <= num_entries.
  __device__ __forceinline__ unsigned entry(int index) const {
    const unsigned sum = first_ + static_cast<unsigned>(index);
    return min(sum, sum - num_entries_);  // below zero wraps to large
  }
  __device__ __forceinline__ T* at(int index) const {
    return reinterpret_cast<T*>(source_ + static_cast<uint64_t>(entry(index)) * width_);
  }

 private:
  unsigned first_;
  unsigned num_entries_;
  unsigned width_;  // bytes of an entry
  char* source_;
};

__device__ __forceinline__ unsigned lane_index() {
  return threadIdx.x % kWarpSize;
}

// x of the inputs since a canonical base: a lane has one input's, of 8 of a tile's channels. From num_inputs on, where
// weights are zero, the last one stands.
template <typename T>
struct LaneInputs {
  static constexpr int kCount = kTileChannels / 2;
  Vector<T, kCount> x;

  // source.at(i): input i's values from the tile's first channel on.
  template <typename Source>
  __device__ __forceinline__ LaneInputs(int num_inputs, const Source& source) {
    const T* values = source.at(min(input(), num_inputs - 1));
    x = *reinterpret_cast<const Vector<T, kCount>*>(values + lane_index() % 2 * kCount);
  }

  // sum_j weight_j x_j of StateTile::channel(): at each turn lanes keep half of their channels and give the others
  // away.
  __device__ __forceinline__ float weighted_sum(const float* weights) const {
    const float weight = weights[input()];
    float sums[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = __fmul_rn(weight, to_float(x.values[i]));
#pragma unroll
    for (int kept = kCount / 2; kept > 0; kept /= 2) {
      const bool is_high = (lane_index() & static_cast<unsigned>(4 * kept)) != 0;
#pragma unroll
      for (int i = 0; i < kept; ++i) {
        const float given = is_high ? sums[i] : sums[kept + i];
        sums[i] = (is_high ? sums[kept + i] : sums[i]) + __shfl_xor_sync(kFullWarp, given, 4 * kept);
      }
    }
    return sums[0] + __shfl_xor_sync(kFullWarp, sums[0], 2);
  }

 private:
  static __device__ __forceinline__ int input() { return static_cast<int>(lane_index() / 2); }
};

// A new token's y of StateTile::channel(). weights: its row of the table.
template <typename T, int kN>
__device__ __forceinline__ float read_out(const StateTile<kN>& state, const LaneQuery<T, kN>& C,
                                          const LaneInputs<T>& inputs, const float* weights) {
  return fmaf(weights[kMaxWindow], state.dot(C), inputs.weighted_sum(weights));
}

// x in shared memory, from a tile's first channel on.
template <typename T>
struct StagedInputs {
  const T* source;
  int width;
  __device__ __forceinline__ const T* at(int i) const { return source + i * width; }
};

// A state that slots hold as fp16 has its values whenever it could be kept, whether it is or not.
template <typename State, int kN>
__device__ __forceinline__ void round_state_at(StateTile<kN>& state, const StateChannels& channels, int position) {
  if constexpr (std::is_same_v<State, __half>) {
    state.round(StateRounding(position), static_cast<uint32_t>(channels.first) * kN);
  }
}

}  // namespace headway::cuda
