// A slot's state over a window, as a warp works on 16 channels of it: the state and what its log brings are copied to
// the warp's own shared memory, asynchronously, and the state goes on to registers (state_tile.cuh).
//
//   S_e = exp(A sum(dt)) S_b + sum_j exp(A sum_{k > j} dt_k) dt_j x_j B_j^T          (fold, arXiv 2405.21060)
//   y_t = exp(A sum(dt)) S_b C_t + sum_{j <= t} exp(A sum_{j < k <= t} dt_k) dt_j (B_j . C_t) x_j + D x_t  (read out)
//
// Sums run from a canonical base on (core/state_base.h), so that their order depends on positions alone.
#pragma once

#include "cuda/common/math.cuh"
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

  template <typename Params>
  __device__ __forceinline__ StateChannels(const Params& params, int64_t channels_slot, int tile)
      : slot(channels_slot),
        first(tile * kTileChannels),
        head(first / params.head_dim),
        group(head / (params.num_heads / params.num_groups)) {}
};

template <typename T, typename Params>
__device__ __forceinline__ float step_size(const Params& params, T raw, int head) {
  return fminf(fmaxf(softplus(to_float(raw) + params.dt_bias[head]), params.dt_min), params.dt_max);
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
    before = A * sum;
    total = __shfl_sync(kFullWarp, before, count - 1, kMaxWindow);
  }

  // Weight of the lane's input at the end of the stretch; 0 beyond.
  __device__ __forceinline__ float weight() const { return dt * expf(total - before); }
};

// A warp's copies in shared memory of a state and the inputs since.
template <typename T, int kN>
struct alignas(16) StateStage {
  static constexpr int kMaxInputs = 24;  // 16 and, of a window's usual rewinds, the new tokens
  float state[kTileChannels * kN];       // at state_offset
  T B[kMaxWindow * kN];                  // at input_offset; of the first stretch alone
  T x[kMaxInputs * kTileChannels];

  // The whole warp calls these. A group of copies is the caller's to commit and to wait for.
  template <typename Params>
  __device__ __forceinline__ void copy_state(const Params& params, const StateChannels& channels, bool is_there) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const float* source = params.ssm_state + channels.slot * params.ssm_state_stride +
                          static_cast<int64_t>(channels.first) * kN + lane * kPieceFloats;
    constexpr int kRowPieces = kN / kPieceFloats;
    constexpr int kCopies = kTileChannels * kRowPieces / kWarpSize;
    constexpr int kPeriod = kCopies / 4;  // the swizzle repeats every 4 rows
    uint32_t targets[kPeriod];
#pragma unroll
    for (int i = 0; i < kPeriod; ++i) {
      const int piece = i * kWarpSize + lane;
      const int offset = state_offset<kN>(piece / kRowPieces, piece % kRowPieces * kPieceFloats);
      targets[i] = shared_address(state + offset);
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      constexpr int kPeriodBytes = 4 * kN * static_cast<int>(sizeof(float));
      copy_async(targets[i % kPeriod] + i / kPeriod * kPeriodBytes, source + i * kWarpSize * kPieceFloats, is_there);
    }
  }

  // x of positions begin .. begin + count - 1.
  template <typename Params>
  __device__ __forceinline__ void copy_x(const Params& params, const StateChannels& channels, int begin, int count) {
    constexpr int kRowPieces = kTileChannels / kVectorWidth<T>;
    const int first = begin % params.log.num_entries;
#pragma unroll 1
    for (int piece = static_cast<int>(threadIdx.x) % kWarpSize; piece < count * kRowPieces; piece += kWarpSize) {
      const int entry = ring_entry(params, first, piece / kRowPieces);
      copy_async(shared_address(x + piece * kVectorWidth<T>),
                 log_column<T>(params, channels.slot, entry, channels.first + piece % kRowPieces * kVectorWidth<T>),
                 true);
    }
  }

  // B of positions begin .. begin + count - 1; zeros after.
  template <typename Params>
  __device__ __forceinline__ void copy_B(const Params& params, const StateChannels& channels, int begin, int count) {
    constexpr int kRowPieces = kN / kVectorWidth<T>;
    const int64_t group_channel = inner_channels(params) + static_cast<int64_t>(channels.group) * kN;
    const int first = begin % params.log.num_entries;
#pragma unroll 4
    for (int piece = static_cast<int>(threadIdx.x) % kWarpSize; piece < kMaxWindow * kRowPieces; piece += kWarpSize) {
      const int input = piece / kRowPieces;
      const int column = piece % kRowPieces * kVectorWidth<T>;
      const int entry = ring_entry(params, first, input < count ? input : 0);
      copy_async(shared_address(B + input_offset<T, kN>(input, column)),
                 log_column<T>(params, channels.slot, entry, group_channel + column), input < count);
    }
  }

 private:
  static constexpr int kPieceFloats = kVectorWidth<float>;

  template <typename Params>
  static __device__ __forceinline__ int ring_entry(const Params& params, int first, int input) {
    const int entry = first + input;
    return entry < params.log.num_entries ? entry : entry - params.log.num_entries;
  }
};

// The lane's raw step size among positions begin .. begin + count - 1 of a head.
template <typename T, typename Params>
__device__ __forceinline__ T load_raw_dt(const Params& params, const StateChannels& channels, int begin, int count) {
  const int lane = static_cast<int>(threadIdx.x) % kMaxWindow;
  const int entry = (begin + (lane < count ? lane : 0)) % params.log.num_entries;
  return *log_dt<T>(params, channels.slot, entry, channels.head);
}

// Where the window that holds `position` ends.
__device__ __forceinline__ int window_end(int position) {
  return position / kMaxWindow * kMaxWindow + kMaxWindow;
}

// What folding a stretch of a head's inputs does to its state.
struct FoldWeights {
  float decay;
  float input;  // the lane's

  FoldWeights() = default;
  template <typename T, typename Params>
  __device__ __forceinline__ FoldWeights(const Params& params, int head, T raw_dt, int count) {
    const float A = params.A[head];
    const Stretch stretch(step_size(params, raw_dt, head), count, A);
    decay = expf(stretch.total);
    input = stretch.weight();
  }
};

}  // namespace headway::cuda
