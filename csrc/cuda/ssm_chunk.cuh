// One chunk of the Mamba-2 scan on the tensor cores (state space duality, arXiv 2405.21060, section 6), bf16.
//
// A block owns a slice of one head's channels for one row and walks the row's chunks in order with the state in fp32
// registers, so nothing but x, B, C, dt and y crosses device memory. With cs the running sum of A dt within a chunk
// (kept in units of log 2), s the state before it and L its last token:
//   y_i = e^cs_i (C_i . s) + sum_{j <= i} (C_i . B_j) e^(cs_i - cs_j) dt_j x_j + D x_i
//   s'  = e^cs_L s + sum_j e^(cs_L - cs_j) dt_j B_j x_j^T
// Exponents are differences, never above zero: products of e^cs_i and e^-cs_j would overflow. Operands of the matrix
// products are bf16, sums fp32; the state is rounded only as an operand.
//
// The four warps share the work twice over: each makes the outputs of 16 tokens, and keeps a quarter of the state's N
// rows. The state is held transposed, [N, slice], so that any slice width that is a multiple of 16 fits the matrix
// shape.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/ssm_scan.h"
#include "params/mamba.h"

namespace headway::cuda::chunk {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * kWarpSize;
inline constexpr int kTokens = kChunkTokens;
inline constexpr int kBlock = 16;  // tokens, or state rows, of one matrix operand
inline constexpr int kNumBlocks = kTokens / kBlock;
inline constexpr float kLog2E = 1.44269504f;
using Bf16 = __nv_bfloat16;

static_assert(kTokens == kWarps * kBlock, "a warp owns one block of a chunk's tokens");

__device__ __forceinline__ float low_bf16(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_bf16(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// Decays of one chunk. Tokens behind the row's end have dt = 0: they neither decay nor add.
struct Decays {
  float log2_sum[kTokens];  // cs
  float dt[kTokens];
  float to_end[kTokens];  // e^(cs_L - cs_j) dt_j
};

// Shared memory. B and C rows are swizzled (16-byte piece c of row r lies at c ^ (r % 8)); rows of x and of the state
// are padded to an odd number of 16-byte pieces. Both keep the 8 rows of a matrix load in different banks.
template <int kN, int kSlice>
struct Shared {
  static constexpr int kPitch = kSlice + 8;
  alignas(128) Bf16 B[2][kTokens * kN];
  alignas(128) Bf16 C[2][kTokens * kN];  // a warp's own 16 rows also carry its outputs on their way to memory
  alignas(128) Bf16 x[2][kTokens * kPitch];
  alignas(128) Bf16 state[kN * kPitch];  // [N, slice], the state before the chunk
  alignas(16) Decays decays[2];
};

template <int kN>
__device__ __forceinline__ int swizzled(int row, int column) {
  return row * kN + (((column / 8) ^ (row & 7)) * 8);
}

// A run of tokens of the row within one cell of the chunk grid.
struct Chunk {
  int64_t token;  // first, flat
  int count;
};

// What a block works on, fixed over its life.
template <int kN, int kSlice>
struct Work {
  const SsmScanParams& params;
  int head;
  int group;
  int first_channel;  // of the slice, within the head
  int num_channels;   // of the slice that exist: kSlice but for the last

  __device__ __forceinline__ void copy_rows(uint32_t target, const Bf16* source, int64_t stride, Chunk chunk) const {
    constexpr int kPieces = kN / 8;
#pragma unroll
    for (int i = 0; i < kTokens * kPieces / kThreads; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x);
      const int row = index / kPieces;
      const int column = index % kPieces * 8;
      const Bf16* from = source + (chunk.token + row) * stride + column;
      copy_async(target + swizzled<kN>(row, column) * sizeof(Bf16), from, row < chunk.count);
    }
  }

  // Starts the copies of a chunk's x, B and C.
  __device__ __forceinline__ void copy_chunk(Shared<kN, kSlice>& shared, int stage, Chunk chunk) const {
    constexpr int kPieces = kSlice / 8;
    copy_rows(shared_address(shared.B[stage]), static_cast<const Bf16*>(params.B) + group * kN, params.b_stride, chunk);
    copy_rows(shared_address(shared.C[stage]), static_cast<const Bf16*>(params.C) + group * kN, params.c_stride, chunk);
    const Bf16* x = static_cast<const Bf16*>(params.x) + head * params.head_dim + first_channel;
    const uint32_t target = shared_address(shared.x[stage]);
#pragma unroll
    for (int i = 0; i < kTokens * kPieces / kThreads; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x);
      const int row = index / kPieces;
      const int column = index % kPieces * 8;
      const Bf16* from = x + (chunk.token + row) * params.x_stride + column;
      copy_async(target + (row * Shared<kN, kSlice>::kPitch + column) * sizeof(Bf16), from,
                 row < chunk.count && column < num_channels);
    }
    commit_copies();
  }

  // One warp: lane l holds tokens 2l and 2l + 1.
  __device__ __forceinline__ float2 load_dt(Chunk chunk) const {
    const int token = 2 * (static_cast<int>(threadIdx.x) % kWarpSize);
    const Bf16* dt = static_cast<const Bf16*>(params.dt) + chunk.token * params.dt_stride + head;
    float2 raw = {0.0f, 0.0f};
    if (token < chunk.count) raw.x = to_float(dt[token * params.dt_stride]);
    if (token + 1 < chunk.count) raw.y = to_float(dt[(token + 1) * params.dt_stride]);
    return raw;
  }

  __device__ __forceinline__ float step_size(float raw, bool is_inside) const {
    const float soft = softplus(raw + params.dt_bias[head]);
    return is_inside ? fminf(fmaxf(soft, params.dt_min), params.dt_max) : 0.0f;
  }

  __device__ __forceinline__ void store_decays(Decays& decays, float2 raw, Chunk chunk) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const float dt0 = step_size(raw.x, 2 * lane < chunk.count);
    const float dt1 = step_size(raw.y, 2 * lane + 1 < chunk.count);
    const float log2_rate = params.A[head] * kLog2E;
    const float log0 = log2_rate * dt0;
    const float log1 = log2_rate * dt1;
    float sum = log0 + log1;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const float before = __shfl_up_sync(kFullWarp, sum, offset);
      if (lane >= offset) sum += before;
    }
    const float before = __shfl_up_sync(kFullWarp, sum, 1);
    const float sum0 = (lane == 0 ? 0.0f : before) + log0;
    const float sum1 = sum0 + log1;
    const float last = __shfl_sync(kFullWarp, sum1, kWarpSize - 1);
    *reinterpret_cast<float2*>(&decays.log2_sum[2 * lane]) = {sum0, sum1};
    *reinterpret_cast<float2*>(&decays.dt[2 * lane]) = {dt0, dt1};
    *reinterpret_cast<float2*>(&decays.to_end[2 * lane]) = {fast_exp2(fminf(last - sum0, 0.0f)) * dt0,
                                                            fast_exp2(fminf(last - sum1, 0.0f)) * dt1};
  }
};

// A warp's share of the state, transposed: rows n = (warp * kTiles + tile) * 16 + g (+ 8), columns p = block * 8 + 2c
// (+ 1).
template <int kN, int kSlice>
struct State {
  static constexpr int kTiles = kN / (kWarps * kBlock);
  static constexpr int kColumns = kSlice / 8;
  float sum[kTiles][kColumns][4];

  __device__ __forceinline__ static int first_row(int tile) {
    return (static_cast<int>(threadIdx.x) / kWarpSize * kTiles + tile) * kBlock;
  }

  // visit(value, n, p) for every element.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit&& visit) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(sum[tile][column][i], first_row(tile) + lane / 4 + i / 2 * 8, column * 8 + lane % 4 * 2 + i % 2);
        }
      }
    }
  }

  // The operand form of the state, for every warp's C . s.
  __device__ __forceinline__ void publish(Bf16* shared_state) const {
    constexpr int kPitch = Shared<kN, kSlice>::kPitch;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        Bf16* target = shared_state + (first_row(tile) + lane / 4) * kPitch + column * 8 + lane % 4 * 2;
        const float (&values)[4] = sum[tile][column];
        *reinterpret_cast<uint32_t*>(target) = pack_pair<Bf16>(values[0], values[1]);
        *reinterpret_cast<uint32_t*>(target + 8 * kPitch) = pack_pair<Bf16>(values[2], values[3]);
      }
    }
  }

  // s = e^cs_L s
  __device__ __forceinline__ void decay(float factor) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[tile][column][i] *= factor;
      }
    }
  }
};

// Lane's row and column in the four matrices of a matrix load.
struct LaneCell {
  int row;
  int column;
};
// Order (rows 0-7, 8-15) within (columns 0-7, 8-15): operand A as stored, operand B transposed.
__device__ __forceinline__ LaneCell rows_first() {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  return {lane % 16, lane / 16 * 8};
}
// Order (columns 0-7, 8-15) within (rows 0-7, 8-15): operand B as stored, operand A transposed.
__device__ __forceinline__ LaneCell columns_first() {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
}

// A warp's 16 output tokens. scores[16, 64] = C . B^T up to the warp's own block; sum[16, slice] the outputs.
template <int kN, int kSlice>
struct Outputs {
  static constexpr int kColumns = kSlice / 8;
  static constexpr int kPitch = Shared<kN, kSlice>::kPitch;
  int block;  // which of the chunk's blocks of 16 tokens is this warp's
  float scores[2 * kNumBlocks][4];
  float sum[kColumns][4];

  // scores = C . B^T and sum = C . s, sharing the operand C.
  __device__ __forceinline__ void multiply_c(const Shared<kN, kSlice>& shared, int stage) {
    const uint32_t B = shared_address(shared.B[stage]);
    const uint32_t C = shared_address(shared.C[stage]);
    const uint32_t state = shared_address(shared.state);
    const LaneCell a_cell = rows_first();
    const LaneCell b_cell = columns_first();
#pragma unroll
    for (auto& tile : scores) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
#pragma unroll
    for (auto& tile : sum) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
#pragma unroll 2
    for (int n = 0; n < kN; n += kBlock) {
      uint32_t a[4];
      load_matrices(a, C + swizzled<kN>(block * kBlock + a_cell.row, n + a_cell.column) * 2);
#pragma unroll
      for (int j = 0; j < kNumBlocks; ++j) {
        if (j > block) break;
        uint32_t b[4];
        load_matrices(b, B + swizzled<kN>(j * kBlock + b_cell.row, n + b_cell.column) * 2);
        multiply_add<Bf16>(scores[2 * j], a, b[0], b[1]);
        multiply_add<Bf16>(scores[2 * j + 1], a, b[2], b[3]);
      }
#pragma unroll
      for (int p = 0; p < kColumns; p += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, state + ((n + a_cell.row) * kPitch + p * 8 + a_cell.column) * 2);
        multiply_add<Bf16>(sum[p], a, b[0], b[1]);
        multiply_add<Bf16>(sum[p + 1], a, b[2], b[3]);
      }
    }
  }

  // sum_i *= e^cs_i
  __device__ __forceinline__ void decay(const Decays& decays) {
    const int token = block * kBlock + static_cast<int>(threadIdx.x) % kWarpSize / 4;
    const float factor[2] = {fast_exp2(decays.log2_sum[token]), fast_exp2(decays.log2_sum[token + 8])};
#pragma unroll
    for (auto& tile : sum) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[i] *= factor[i / 2];
    }
  }

  // Operand A of block j: score_ij e^(cs_i - cs_j) dt_j for j <= i, else 0.
  __device__ __forceinline__ void weigh(uint32_t (&weights)[4], const Decays& decays, int j) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int row = block * kBlock + lane / 4;
    const float row_sum[2] = {decays.log2_sum[row], decays.log2_sum[row + 8]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = j * kBlock + half * 8 + lane % 4 * 2;
      const float2 column_sum = *reinterpret_cast<const float2*>(&decays.log2_sum[column]);
      const float2 dt = *reinterpret_cast<const float2*>(&decays.dt[column]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int token = row + r * 8;
        const float w0 = fast_exp2(fminf(row_sum[r] - column_sum.x, 0.0f)) * dt.x * scores[2 * j + half][2 * r];
        const float w1 = fast_exp2(fminf(row_sum[r] - column_sum.y, 0.0f)) * dt.y * scores[2 * j + half][2 * r + 1];
        weights[half * 2 + r] = pack_pair<Bf16>(column <= token ? w0 : 0.0f, column + 1 <= token ? w1 : 0.0f);
      }
    }
  }

  // y = sum + D x, through the warp's own rows of C to 16-byte stores.
  __device__ __forceinline__ void store(Shared<kN, kSlice>& shared, int stage, const Work<kN, kSlice>& work,
                                        Chunk chunk) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const float D = work.params.D[work.head];
    Bf16* staged = shared.C[stage];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = block * kBlock + lane / 4 + r * 8;
#pragma unroll
      for (int p = 0; p < kColumns; ++p) {
        const uint32_t x = *reinterpret_cast<const uint32_t*>(&shared.x[stage][row * kPitch + p * 8 + lane % 4 * 2]);
        const uint32_t y =
            pack_pair<Bf16>(fmaf(D, low_bf16(x), sum[p][2 * r]), fmaf(D, high_bf16(x), sum[p][2 * r + 1]));
        *reinterpret_cast<uint32_t*>(&staged[swizzled<kN>(row, p * 8) + lane % 4 * 2]) = y;
      }
    }
    __syncwarp();
    const int64_t out_stride = static_cast<int64_t>(work.params.num_heads) * work.params.head_dim;
    Bf16* out = static_cast<Bf16*>(work.params.out) + chunk.token * out_stride +
                static_cast<int64_t>(work.head) * work.params.head_dim + work.first_channel;
#pragma unroll
    for (int index = lane; index < kBlock * kColumns; index += kWarpSize) {
      const int row = block * kBlock + index / kColumns;
      const int column = index % kColumns * 8;
      if (row < chunk.count && column < work.num_channels) {
        *reinterpret_cast<uint4*>(out + row * out_stride + column) =
            *reinterpret_cast<const uint4*>(&staged[swizzled<kN>(row, column)]);
      }
    }
  }
};

// Adds what the chunk's own tokens contribute, to the outputs (weights . x) and to the state ((w B)^T . x): both need
// every block of x as operand B.
template <int kN, int kSlice>
__device__ __forceinline__ void add_tokens(const Shared<kN, kSlice>& shared, int stage, Outputs<kN, kSlice>& outputs,
                                           State<kN, kSlice>& state) {
  constexpr int kColumns = kSlice / 8;
  const Decays& decays = shared.decays[stage];
  const uint32_t x = shared_address(shared.x[stage]);
  const uint32_t B = shared_address(shared.B[stage]);
  const LaneCell x_cell = rows_first();
  const LaneCell b_cell = columns_first();
#pragma unroll
  for (int j = 0; j < kNumBlocks; ++j) {
    uint32_t columns[kColumns / 2][4];
#pragma unroll
    for (int p = 0; p < kColumns / 2; ++p) {
      const int offset = (j * kBlock + x_cell.row) * Shared<kN, kSlice>::kPitch + p * 16 + x_cell.column;
      load_matrices_transposed(columns[p], x + offset * 2);
    }
    if (j <= outputs.block) {
      uint32_t weights[4];
      outputs.weigh(weights, decays, j);
#pragma unroll
      for (int p = 0; p < kColumns / 2; ++p) {
        multiply_add<Bf16>(outputs.sum[2 * p], weights, columns[p][0], columns[p][1]);
        multiply_add<Bf16>(outputs.sum[2 * p + 1], weights, columns[p][2], columns[p][3]);
      }
    }
    const int token = j * kBlock + static_cast<int>(threadIdx.x) % 4 * 2;
    const float2 near = *reinterpret_cast<const float2*>(&decays.to_end[token]);
    const float2 far = *reinterpret_cast<const float2*>(&decays.to_end[token + 8]);
#pragma unroll
    for (int tile = 0; tile < State<kN, kSlice>::kTiles; ++tile) {
      uint32_t a[4];
      const int n = State<kN, kSlice>::first_row(tile) + b_cell.column;
      load_matrices_transposed(a, B + swizzled<kN>(j * kBlock + b_cell.row, n) * 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 weight = i < 2 ? near : far;
        a[i] = pack_pair<Bf16>(low_bf16(a[i]) * weight.x, high_bf16(a[i]) * weight.y);
      }
#pragma unroll
      for (int p = 0; p < kColumns / 2; ++p) {
        multiply_add<Bf16>(state.sum[tile][2 * p], a, columns[p][0], columns[p][1]);
        multiply_add<Bf16>(state.sum[tile][2 * p + 1], a, columns[p][2], columns[p][3]);
      }
    }
  }
}

}  // namespace headway::cuda::chunk
