// The Mamba-2 recurrence token by token, fp32 throughout, for decode rows, short rows and fp32 models.
//
// A block owns some rows of one head's state matrix [P, N] for one row of the step, keeps them in registers over all of
// the row's tokens, and touches no other block's data: in-place slots need no ordering. A state row lies across kLanes
// lanes in 16-byte pieces; y is the lanes' sum in a fixed order, so neither batch nor cuts change a bit.
#include "cuda/common/math.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"
#include "cuda/ssm_scan.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "ssm_scan";
constexpr int kMaxWarps = 8;
constexpr int kPiece = 4;  // floats a lane loads at once

// How a warp holds its state rows.
template <int kN>
struct Layout {
  static constexpr int kLanes = kN / kPiece < 8 ? kN / kPiece : 8;  // lanes across N
  static constexpr int kPieces = kN / (kPiece * kLanes);            // pieces of a state row a lane
  static constexpr int kRowsAtOnce = kWarpSize / kLanes;
  static constexpr int kRows = kPieces > 4 ? 2 : 4;                 // state rows a lane: at most 64 registers
  static constexpr int kWarpRows = kRowsAtOnce * kRows;
  static constexpr int kTile = kN > 128 ? 8 : 16;                   // tokens staged in shared memory
};

template <int kN>
struct Tile {
  static constexpr int kTokens = Layout<kN>::kTile;
  static constexpr int kMaxRows = Layout<kN>::kWarpRows * kMaxWarps;
  alignas(16) float B[kTokens][kN];
  alignas(16) float C[kTokens][kN];
  float x[kTokens][kMaxRows];
  float y[kTokens][kMaxRows];
  float dt[kTokens];
  float decay[kTokens];
};

// Stages `count` tokens from flat token `token` on. kIsExact: N == kN; else the rest of the state row is zeros.
template <typename T, int kN, bool kIsExact>
__device__ __forceinline__ void load_tile(const SsmScanParams& params, Tile<kN>& tile, int64_t token, int count,
                                          int head, int first_p, int num_p) {
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
  using L = Layout<kN>;
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

  __device__ __forceinline__ void load(const float* source, int num_rows, int state_size) {
    for_each_piece(num_rows, state_size, [&](float (&piece)[kPiece], int offset, int inside) {
      if constexpr (kIsExact) {
        load_floats<float, kPiece>(source + offset, piece);
      } else {
        for (int i = 0; i < kPiece; ++i) piece[i] = i < inside ? source[offset + i] : 0.0f;
      }
    });
  }

  __device__ __forceinline__ void store(float* target, int num_rows, int state_size) {
    for_each_piece(num_rows, state_size, [&](float (&piece)[kPiece], int offset, int inside) {
      if constexpr (kIsExact) {
        store_floats<float, kPiece>(target + offset, piece);
      } else {
        for (int i = 0; i < kPiece && i < inside; ++i) target[offset + i] = piece[i];
      }
    });
  }

  // S = decay S + (dt x) B^T, y = S C + D x for token t of the tile; `first_row` is the warp's first row in the tile.
  __device__ __forceinline__ void step(Tile<kN>& tile, int t, int first_row, int num_rows, float D) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const float dt = tile.dt[t];
    const float decay = tile.decay[t];
    float x[L::kRows];
    float sums[L::kRows] = {};
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) x[r] = tile.x[t][first_row + r * L::kRowsAtOnce + lane / L::kLanes];
#pragma unroll
    for (int c = 0; c < L::kPieces; ++c) {
      const int n = (c * L::kLanes + lane % L::kLanes) * kPiece;
      float B[kPiece];
      float C[kPiece];
      load_floats<float, kPiece>(&tile.B[t][n], B);
      load_floats<float, kPiece>(&tile.C[t][n], C);
#pragma unroll
      for (int r = 0; r < L::kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          float& value = values[r][c][i];
          value = fmaf(decay, value, dt * x[r] * B[i]);
          sums[r] = fmaf(value, C[i], sums[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const int p = r * L::kRowsAtOnce + lane / L::kLanes;
      const float sum = warp_sum<L::kLanes>(sums[r]);
      if (lane % L::kLanes == 0 && p < num_rows) tile.y[t][first_row + p] = fmaf(D, x[r], sum);
    }
  }
};

template <typename T, int kN>
__device__ __forceinline__ void store_tile(const SsmScanParams& params, const Tile<kN>& tile, int64_t token, int count,
                                           int head, int first_p, int num_p) {
  const int64_t out_stride = static_cast<int64_t>(params.num_heads) * params.head_dim;
  T* out = static_cast<T*>(params.out) + token * out_stride + head * params.head_dim + first_p;
  for (int i = static_cast<int>(threadIdx.x); i < count * num_p; i += static_cast<int>(blockDim.x)) {
    const int t = i / num_p;
    const int p = i - t * num_p;
    out[t * out_stride + p] = from_float<T>(tile.y[t][p]);
  }
}

template <typename T, int kN, bool kIsExact>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) recurrent_scan_kernel(SsmScanParams params, int slices) {
  using L = Layout<kN>;
  __shared__ Tile<kN> tile;
  // Block -> (row, head, slice of the head's state rows).
  const int slice = static_cast<int>(blockIdx.x) % slices;
  const int head = static_cast<int>(blockIdx.x) / slices % params.num_heads;
  const int row = static_cast<int>(blockIdx.x) / slices / params.num_heads;
  const int slice_rows = static_cast<int>(blockDim.x) / kWarpSize * L::kWarpRows;
  const int first_p = slice * slice_rows;
  const int num_p = min(slice_rows, params.head_dim - first_p);
  const int warp_row = static_cast<int>(threadIdx.x) / kWarpSize * L::kWarpRows;
  const int warp_rows = min(L::kWarpRows, num_p - warp_row);

  const int begin = params.rows.query_start[row];
  const int end = params.rows.query_start[row + 1];
  const int64_t state_offset =
      (static_cast<int64_t>(head) * params.head_dim + first_p + warp_row) * params.state_size;

  StateRows<kN, kIsExact> state;
  state.clear();
  if (params.rows.row_start[row] > 0) {
    const float* source = params.state + params.read_slots[row] * params.state_stride + state_offset;
    state.load(source, warp_rows, params.state_size);
  }
  for (int token = begin; token < end; token += L::kTile) {
    const int count = min(L::kTile, end - token);
    load_tile<T, kN, kIsExact>(params, tile, token, count, head, first_p, num_p);
    __syncthreads();
    for (int t = 0; t < count; ++t) state.step(tile, t, warp_row, warp_rows, params.D[head]);
    __syncthreads();
    store_tile<T, kN>(params, tile, token, count, head, first_p, num_p);
  }
  float* target = params.state + params.write_slots[row] * params.state_stride + state_offset;
  state.store(target, warp_rows, params.state_size);
}

template <typename T, int kN, bool kIsExact>
void launch(const SsmScanParams& params, cudaStream_t stream) {
  using L = Layout<kN>;
  // As many warps a block as a head has state rows for; single warps when that leaves the chip empty.
  const int64_t num_heads = static_cast<int64_t>(params.rows.num_rows) * params.num_heads;
  const int head_warps = (params.head_dim + L::kWarpRows - 1) / L::kWarpRows;
  const int warps = num_heads < 256 ? 1 : (head_warps < kMaxWarps ? head_warps : kMaxWarps);
  const int slices = (head_warps + warps - 1) / warps;
  require(num_heads * slices <= INT32_MAX, kOp, "num_rows * num_heads is too large for one launch");
  recurrent_scan_kernel<T, kN, kIsExact>
      <<<static_cast<unsigned>(num_heads * slices), warps * kWarpSize, 0, stream>>>(params, slices);
  check_launch(kOp);
}

template <typename T>
void launch_state_size(const SsmScanParams& params, cudaStream_t stream) {
  const int state_size = params.state_size;
  const bool is_aligned = is_vectorisable<float>(params.state, params.state_stride, state_size);
  if (is_aligned && state_size == 16) return launch<T, 16, true>(params, stream);
  if (is_aligned && state_size == 32) return launch<T, 32, true>(params, stream);
  if (is_aligned && state_size == 64) return launch<T, 64, true>(params, stream);
  if (is_aligned && state_size == 128) return launch<T, 128, true>(params, stream);
  if (is_aligned && state_size == 256) return launch<T, 256, true>(params, stream);
  if (state_size <= 64) return launch<T, 64, false>(params, stream);
  if (state_size <= 256) return launch<T, 256, false>(params, stream);
  require(false, kOp, "state_size is " + std::to_string(state_size) + "; the limit is 256");
}

}  // namespace

void launch_recurrent_scan(const SsmScanParams& params, cudaStream_t stream) {
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    launch_state_size<typename decltype(tag)::Type>(params, stream);
  });
}

}  // namespace headway::cuda
