// A slot's state over a window: what a warp holds of it in registers (ssm_recurrence.cuh), and the inputs since.
//
//   S_e = exp(A sum(dt)) S_b + sum_j exp(A sum_{k > j} dt_k) dt_j x_j B_j^T          (fold, arXiv 2405.21060)
//   y_t = exp(A sum(dt)) S_b C_t + sum_{j <= t} exp(A sum_{j < k <= t} dt_k) dt_j (B_j . C_t) x_j + D x_t  (read out)
//
// Sums run from a canonical base on (core/state_base.h), so that their order depends on positions alone.
#pragma once

#include "cuda/mamba_decode.h"
#include "cuda/ssm_recurrence.cuh"

namespace headway::cuda {

inline constexpr int kFoldWarps = 4;  // a block at most

template <typename T, typename Params>
__device__ __forceinline__ float step_size(const Params& params, T raw, int head) {
  return fminf(fmaxf(softplus(to_float(raw) + params.dt_bias[head]), params.dt_min), params.dt_max);
}

// Lane l's entry of a stretch of `count` <= kMaxWindow tokens; dt is the lane's step size.
struct Stretch {
  float dt;      // 0 beyond the stretch
  float before;  // A sum(dt) up to and with the entry
  float total;   // A sum(dt) of the stretch

  __device__ __forceinline__ Stretch(float lane_dt, int count, float A) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    dt = lane < count ? lane_dt : 0.0f;
    float sum = dt;
#pragma unroll
    for (int offset = 1; offset < kMaxWindow; offset *= 2) {
      const float other = __shfl_up_sync(kFullWarp, sum, offset);
      if (lane >= offset) sum += other;
    }
    before = A * sum;
    total = __shfl_sync(kFullWarp, before, count - 1);
  }

  // Weight of the lane's input at the end of the stretch.
  __device__ __forceinline__ float weight() const { return dt * expf(total - before); }
};

template <int kN>
__device__ __forceinline__ void load_state(StateRows<kN, true>& state, const float* source) {
  state.for_each_piece(ScanLayout<kN>::kWarpRows, kN, [&](float (&piece)[kPiece], int offset, int) {
    const float4 value = __ldcs(reinterpret_cast<const float4*>(source + offset));
    piece[0] = value.x, piece[1] = value.y, piece[2] = value.z, piece[3] = value.w;
  });
}

template <int kN>
__device__ __forceinline__ void store_state(StateRows<kN, true>& state, float* target) {
  state.for_each_piece(ScanLayout<kN>::kWarpRows, kN, [&](float (&piece)[kPiece], int offset, int) {
    __stcs(reinterpret_cast<float4*>(target + offset), make_float4(piece[0], piece[1], piece[2], piece[3]));
  });
}

// The inputs of a stretch that a block folds.
template <int kN>
struct FoldMemory {
  static constexpr int kChannels = kFoldWarps * ScanLayout<kN>::kWarpRows;
  alignas(16) float B[kMaxWindow][kN];
  float x[kMaxWindow][kChannels];
};

// Positions [begin, begin + count), for the block's channels. All its threads call it.
template <typename T, int kN, typename Params>
__device__ __forceinline__ void stage_stretch(const Params& params, int64_t slot, int group, int first_channel,
                                              int num_channels, int begin, int count, FoldMemory<kN>& memory) {
  const int64_t group_channel = inner_channels(params) + static_cast<int64_t>(group) * kN;
  __syncthreads();  // the stretch before is folded
#pragma unroll 2
  for (int index = static_cast<int>(threadIdx.x); index < count * (kN / kPiece);
       index += static_cast<int>(blockDim.x)) {
    const int entry = index / (kN / kPiece);
    const int n = index % (kN / kPiece) * kPiece;
    float piece[kPiece];
    load_floats(log_column<T>(params, slot, (begin + entry) % params.log.num_entries, group_channel + n), piece);
    store_floats(&memory.B[entry][n], piece);
  }
#pragma unroll 2
  for (int index = static_cast<int>(threadIdx.x); index < count * num_channels; index += static_cast<int>(blockDim.x)) {
    const int entry = index / num_channels;
    const int channel = index - entry * num_channels;
    memory.x[entry][channel] =
        to_float(*log_column<T>(params, slot, (begin + entry) % params.log.num_entries, first_channel + channel));
  }
  __syncthreads();
}

// The stretch of a head's positions [begin, begin + count) in the log.
template <typename T, typename Params>
__device__ __forceinline__ Stretch logged_stretch(const Params& params, int64_t slot, int head, int begin, int count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float dt = 0.0f;
  if (lane < count) {
    dt = step_size(params, *log_dt<T>(params, slot, (begin + lane) % params.log.num_entries, head), head);
  }
  return Stretch(dt, count, params.A[head]);
}

// Folds `count` inputs into the state: B [count, N] and x [count, x_stride] at the warp's first channel, both fp32.
template <int kN>
__device__ __forceinline__ void fold_stretch(StateRows<kN, true>& state, const Stretch& stretch, int count,
                                             const float* B, const float* x, int x_stride) {
  using L = ScanLayout<kN>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const float weights = stretch.weight();
  const float decay = expf(stretch.total);
#pragma unroll
  for (int r = 0; r < L::kRows; ++r) {
#pragma unroll
    for (int c = 0; c < L::kPieces; ++c) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) state.values[r][c][i] *= decay;
    }
  }
  x += lane / L::kLanes;
  B += lane % L::kLanes * kPiece;
  for (int j = 0; j < count; ++j, x += x_stride, B += kN) {
    const float weight = __shfl_sync(kFullWarp, weights, j);
    float inflow[L::kRows];
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) inflow[r] = weight * x[r * L::kRowsAtOnce];
#pragma unroll
    for (int c = 0; c < L::kPieces; ++c) {
      float piece[kPiece];
      load_floats<float, kPiece>(B + c * L::kLanes * kPiece, piece);
#pragma unroll
      for (int r = 0; r < L::kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          state.values[r][c][i] = fmaf(inflow[r], piece[i], state.values[r][c][i]);
        }
      }
    }
  }
}

// A lane's part of C, in the order of its pieces of a state row.
template <typename T, int kN>
struct LaneStates {
  using L = ScanLayout<kN>;
  Vector<T, kPiece> pieces[L::kPieces];

  __device__ __forceinline__ void load(const T* source) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int c = 0; c < L::kPieces; ++c) {
      pieces[c] = *reinterpret_cast<const Vector<T, kPiece>*>(source + (c * L::kLanes + lane % L::kLanes) * kPiece);
    }
  }
};

// S C: lane l gets the sum of row l % kWarpRows.
template <typename T, int kN>
__device__ __forceinline__ float state_dot(const StateRows<kN, true>& state, const LaneStates<T, kN>& C) {
  using L = ScanLayout<kN>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float sums[L::kRows] = {};
#pragma unroll
  for (int c = 0; c < L::kPieces; ++c) {
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        sums[r] = fmaf(state.values[r][c][i], to_float(C.pieces[c].values[i]), sums[r]);
      }
    }
  }
  // Row r * kRowsAtOnce + g is summed in the lanes of group g; lane l wants row l % kWarpRows.
  const int row = lane % L::kWarpRows;
  const int source = row % L::kRowsAtOnce * L::kLanes;
  float dot = 0.0f;
#pragma unroll
  for (int r = 0; r < L::kRows; ++r) {
    const float sum = __shfl_sync(kFullWarp, warp_sum<L::kLanes>(sums[r]), source);
    if (row / L::kRowsAtOnce == r) dot = sum;
  }
  return dot;
}

}  // namespace headway::cuda
