// The Mamba-2 recurrence token by token, fp32 throughout: what a block does for one row and one head. A state that
// slots hold as fp16 is rounded after every token, so that cuts change nothing.
//
// Some rows of the head's state matrix [P, N] stay in registers over all tokens. A state row lies across kLanes lanes
// in 16-byte pieces; y is the lanes' sum in an order that depends on N alone, so neither batch, nor block size, nor
// cuts change a bit.
#pragma once

#include <type_traits>

#include "cuda/common/math.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/state_rounding.cuh"
#include "cuda/common/vector.cuh"
#include "params/mamba.h"

namespace headway::cuda {

inline constexpr int kMaxScanWarps = 8;
inline constexpr int kPiece = 4;  // floats a lane loads at once

// How a warp holds its state rows.
template <int kN>
struct ScanLayout {
  static constexpr int kLanes = kN / kPiece < 8 ? kN / kPiece : 8;  // lanes across N
  static constexpr int kPieces = kN / (kPiece * kLanes);            // pieces of a state row a lane
  static constexpr int kRowsAtOnce = kWarpSize / kLanes;
  static constexpr int kRows = kPieces > 4 ? 2 : 4;  // state rows a lane: at most 64 registers
  static constexpr int kWarpRows = kRowsAtOnce * kRows;
  static constexpr int kTile = kN > 128 ? 8 : 16;  // tokens staged in shared memory
};

template <int kN>
struct ScanTile {
  static constexpr int kTokens = ScanLayout<kN>::kTile;
  static constexpr int kMaxRows = ScanLayout<kN>::kWarpRows * kMaxScanWarps;
  alignas(16) float B[kTokens][kN];
  alignas(16) float C[kTokens][kN];
  float x[kTokens][kMaxRows];
  float y[kTokens][kMaxRows];
  float dt[kTokens];
  float decay[kTokens];
};

// Stages `count` tokens from flat token `token` on. kIsExact: N == kN; else the rest of the state row is zeros.
template <typename T, int kN, bool kIsExact>
__device__ __forceinline__ void load_scan_tile(const SsmScanParams& params, ScanTile<kN>& tile, int64_t token,
                                               int count, int head, int first_p, int num_p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int num_threads = static_cast<int>(blockDim.x);
  const int group = head / (params.num_heads / params.num_groups);
  const T* B = static_cast<const T*>(params.B) + token * params.b_stride + group * params.state_size;
  const T* C = static_cast<const T*>(params.C) + token * params.c_stride + group * params.state_size;
  const T* x = static_cast<const T*>(params.x) + token * params.x_stride + head * params.head_dim + first_p;
  const T* dt = static_cast<const T*>(params.dt) + token * params.dt_stride + head;
  for (int i = thread; i < count * kN; i += num_threads) {
    const int t = i / kN;
    const int n = i % kN;
    const bool is_inside = kIsExact || n < params.state_size;
    tile.B[t][n] = is_inside ? to_float(B[t * params.b_stride + n]) : 0.0f;
    tile.C[t][n] = is_inside ? to_float(C[t * params.c_stride + n]) : 0.0f;
  }
  for (int i = thread; i < count * num_p; i += num_threads) {
    const int t = i / num_p;
    const int p = i - t * num_p;
    tile.x[t][p] = to_float(x[t * params.x_stride + p]);
  }
  for (int t = thread; t < count; t += num_threads) {
    const float raw = softplus(to_float(dt[t * params.dt_stride]) + params.dt_bias[head]);
    const float clamped = fminf(fmaxf(raw, params.dt_min), params.dt_max);
    tile.dt[t] = clamped;
    tile.decay[t] = expf(params.A[head] * clamped);
  }
}

// The state rows a lane holds: row r is p = r * kRowsAtOnce + lane / kLanes of its warp; piece c starts at
// n = (c * kLanes + lane % kLanes) * kPiece.
template <int kN, bool kIsExact>
struct StateRows {
  using L = ScanLayout<kN>;
  float values[L::kRows][L::kPieces][kPiece];

  template <typename Visit>
  __device__ __forceinline__ void for_each_piece(int num_rows, int state_size, Visit&& visit) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const int p = r * L::kRowsAtOnce + lane / L::kLanes;
      if (p >= num_rows) continue;
#pragma unroll
      for (int c = 0; c < L::kPieces; ++c) {
        const int n = (c * L::kLanes + lane % L::kLanes) * kPiece;
        visit(values[r][c], p * state_size + n, state_size - n);
      }
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < L::kPieces; ++c) {
#pragma unroll
        for (int i = 0; i < kPiece; ++i) values[r][c][i] = 0.0f;
      }
    }
  }

  template <typename State>
  __device__ __forceinline__ void load(const State* source, int num_rows, int state_size) {
    for_each_piece(num_rows, state_size, [&](float (&piece)[kPiece], int offset, int inside) {
      if constexpr (kIsExact) {
        load_floats<State, kPiece>(source + offset, piece);
      } else {
        for (int i = 0; i < kPiece; ++i) piece[i] = i < inside ? to_float(source[offset + i]) : 0.0f;
      }
    });
  }

  // Of State __half: values that round() has made fit.
  template <typename State>
  __device__ __forceinline__ void store(State* target, int num_rows, int state_size) {
    for_each_piece(num_rows, state_size, [&](float (&piece)[kPiece], int offset, int inside) {
      if constexpr (kIsExact) {
        store_floats<State, kPiece>(target + offset, piece);
      } else {
        for (int i = 0; i < kPiece && i < inside; ++i) target[offset + i] = from_float<State>(piece[i]);
      }
    });
  }

  // To fp16's values. `element`: where the warp's first row begins in the slot.
  __device__ __forceinline__ void round(const StateRounding& rounding, int64_t element, int num_rows, int state_size) {
    for_each_piece(num_rows, state_size, [&](float (&piece)[kPiece], int offset, int) {
      const auto first = static_cast<uint32_t>(element + offset);
      if constexpr (kIsExact) {
        round_states(rounding, first, piece);
      } else {
        for (int i = 0; i < kPiece; ++i) piece[i] = round_to_half(piece[i], rounding.bits(first + i));
      }
    });
  }

  // One token: S = decay S + (dt x) B^T, y = S C + D x. B and C are the token's, x and y begin at the warp's first row.
  __device__ __forceinline__ void step(const float* B, const float* C, const float* x, float dt, float decay, float D,
                                       int num_rows, float* y) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    float row_x[L::kRows];
    float sums[L::kRows] = {};
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) row_x[r] = x[r * L::kRowsAtOnce + lane / L::kLanes];
#pragma unroll
    for (int c = 0; c < L::kPieces; ++c) {
      const int n = (c * L::kLanes + lane % L::kLanes) * kPiece;
      float piece_B[kPiece];
      float piece_C[kPiece];
      load_floats<float, kPiece>(B + n, piece_B);
      load_floats<float, kPiece>(C + n, piece_C);
#pragma unroll
      for (int r = 0; r < L::kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          float& value = values[r][c][i];
          value = fmaf(decay, value, dt * row_x[r] * piece_B[i]);
          sums[r] = fmaf(value, piece_C[i], sums[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const int p = r * L::kRowsAtOnce + lane / L::kLanes;
      const float sum = warp_sum<L::kLanes>(sums[r]);
      if (lane % L::kLanes == 0 && p < num_rows) y[p] = fmaf(D, row_x[r], sum);
    }
  }
};

// The y of `num_rows` state rows, by the warp that made them: those of tile.y from tile_row on, channels from first_p
// on.
template <typename T, int kN>
__device__ __forceinline__ void store_warp_rows(const SsmScanParams& params, const ScanTile<kN>& tile, int64_t token,
                                                int count, int head, int first_p, int tile_row, int num_rows) {
  const int64_t out_stride = static_cast<int64_t>(params.num_heads) * params.head_dim;
  T* out = static_cast<T*>(params.out) + token * out_stride + head * params.head_dim + first_p;
  for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < count * num_rows; i += kWarpSize) {
    const int t = i / num_rows;
    const int p = i - t * num_rows;
    out[t * out_stride + p] = from_float<T>(tile.y[t][tile_row + p]);
  }
}

// Flat tokens [begin, end) of one row, and where its state comes from (null: zeros) and goes to: slot bases. A snapshot
// at position p is the state before flat token p + origin; those at or before `begin` are not the span's.
struct RecurrentSpan {
  int64_t begin;
  int64_t end;
  const void* source;
  void* target;
  int64_t origin = 0;
  int first_snapshot = 0;
  int end_snapshot = 0;
};

// All tokens of a row.
template <typename State = float>
__device__ __forceinline__ RecurrentSpan recurrent_span(const SsmScanParams& params, int row) {
  const int start = params.rows.row_start[row];
  const int64_t begin = params.rows.query_start[row];
  State* slots = static_cast<State*>(params.state);
  RecurrentSpan span{begin, params.rows.query_start[row + 1],
                     start > 0 ? slots + params.read_slots[row] * params.state_stride : nullptr,
                     slots + params.write_slots[row] * params.state_stride, begin - start};
  if (params.snapshots.starts != nullptr) {
    span.first_snapshot = params.snapshots.starts[row];
    span.end_snapshot = params.snapshots.starts[row + 1];
  }
  return span;
}

// The flat token before which the snapshot is taken; beyond the span when there is none.
__device__ __forceinline__ int64_t snapshot_token(const SsmScanParams& params, const RecurrentSpan& span,
                                                  int snapshot) {
  return snapshot < span.end_snapshot ? span.origin + params.snapshots.positions[snapshot] : span.end + 1;
}

// Scans the span for channels [first_p, first_p + num_p) of one head. The whole block calls it; `tile` is free again
// when it returns.
template <typename T, int kN, bool kIsExact, typename State = float>
__device__ __forceinline__ void scan_recurrently(const SsmScanParams& params, const RecurrentSpan& span, int head,
                                                 int first_p, int num_p, ScanTile<kN>& tile) {
  using L = ScanLayout<kN>;
  const int block_rows = min(static_cast<int>(blockDim.x) / kWarpSize, kMaxScanWarps) * L::kWarpRows;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarpSize * L::kWarpRows;
  for (int done = 0; done < num_p; done += block_rows) {
    const int p = first_p + done;
    const int block_p = min(block_rows, num_p - done);
    const int warp_rows = min(L::kWarpRows, block_p - warp_row);
    const int64_t offset = (static_cast<int64_t>(head) * params.head_dim + p + warp_row) * params.state_size;
    StateRows<kN, kIsExact> state;
    state.clear();
    if (span.source != nullptr) {
      state.load(static_cast<const State*>(span.source) + offset, warp_rows, params.state_size);
    }
    int snapshot = span.first_snapshot;
    while (snapshot_token(params, span, snapshot) <= span.begin) ++snapshot;
    for (int64_t token = span.begin; token < span.end;) {
      const int64_t next_snapshot = snapshot_token(params, span, snapshot);
      const int64_t tile_end = min(min(token + L::kTile, span.end), next_snapshot);
      const int count = static_cast<int>(tile_end - token);
      load_scan_tile<T, kN, kIsExact>(params, tile, token, count, head, p, block_p);
      __syncthreads();
      const int num_steps = warp_rows > 0 ? count : 0;  // a block may have warps that the tile has no rows for
      for (int t = 0; t < num_steps; ++t) {
        state.step(tile.B[t], tile.C[t], &tile.x[t][warp_row], tile.dt[t], tile.decay[t], params.D[head], warp_rows,
                   &tile.y[t][warp_row]);
        if constexpr (std::is_same_v<State, __half>) {
          const StateRounding rounding(static_cast<int32_t>(token + t + 1 - span.origin));
          state.round(rounding, offset, warp_rows, params.state_size);
        }
      }
      __syncwarp();  // y stays within the warp
      store_warp_rows<T, kN>(params, tile, token, count, head, p + warp_row, warp_row, warp_rows);
      __syncthreads();
      if (tile_end == next_snapshot) {
        State* slot = static_cast<State*>(params.state) + params.snapshots.slots[snapshot++] * params.state_stride;
        state.store(slot + offset, warp_rows, params.state_size);
      }
      token = tile_end;
    }
    state.store(static_cast<State*>(span.target) + offset, warp_rows, params.state_size);
  }
}

}  // namespace headway::cuda
