// 16 channels of a slot's state in a warp's registers, as accumulators of m16n8k16 products: rows are channels, columns
// are states. Knows nothing of rows, slots and windows.
//
// Which of a product's columns is which state is free as long as its operand B agrees. Here columns 2c and 2c + 1 of
// tiles 2p and 2p + 1 are the states 16p + 4c .. 16p + 4c + 3, so that a lane moves them as one piece.
//
// Folding 16 inputs, sum_k (w_k x_k) B_k^T, is a product on the tensor cores. They take bf16, so each fp32 factor goes
// in as a sum of bf16 terms (bf16 itself is one, fp16 two, fp32 three) and every product of terms above 2^-24 of the
// whole is made, which keeps fp32's accuracy (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial
// intelligence datatype for higher-precision computations", 2019). The state itself is scaled and added to in fp32.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/state_rounding.cuh"
#include "cuda/common/vector.cuh"

namespace headway::cuda {

inline constexpr int kTileChannels = 16;
inline constexpr int kTileInputs = 16;
inline constexpr int kFactorTerms = 3;  // of an fp32 factor
inline constexpr int kStatePiece = 4;  // neighbouring states of a lane

template <typename T>
inline constexpr int kInputTerms = sizeof(T) == 4 ? 3 : 2;
template <>
inline constexpr int kInputTerms<__nv_bfloat16> = 1;

// Two values as sums of bf16 terms, largest first.
template <int kTerms>
__device__ __forceinline__ void split_pair(float first, float second, uint32_t (&terms)[kTerms]) {
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    terms[i] = pack_pair<__nv_bfloat16>(first, second);
    first -= __uint_as_float(terms[i] << 16);
    second -= __uint_as_float(terms[i] & 0xffff0000u);
  }
}

// Where in shared memory column `column` (of the products, not the state's) of input `input` lies, B being [16, N]:
// 16-byte pieces swizzled, so that ldmatrix meets no bank twice.
template <typename T, int kN>
__device__ __forceinline__ int input_offset(int input, int column) {
  constexpr int kWidth = kVectorWidth<T>;
  return input * kN + ((column / kWidth) ^ (input & 7)) * kWidth + column % kWidth;
}

// The products' column of state n.
__device__ __forceinline__ int column_of(int n) {
  return n / 16 * 16 + n % 4 / 2 * 8 + n % 16 / 4 * 2 + n % 2;
}

// A lane's part of a token's C, in the order of its states.
template <typename T, int kN>
struct LaneQuery {
  static constexpr int kPieces = kN / 16;
  Vector<T, kStatePiece> pieces[kPieces];

  __device__ __forceinline__ void load(const T* source) {
    source += threadIdx.x % 4 * kStatePiece;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      pieces[p] = *reinterpret_cast<const Vector<T, kStatePiece>*>(source + 16 * p);
    }
  }
};

// x of two neighbouring inputs each, as a lane of operand A has them: of inputs 2 (lane % 4) and the next, channels
// lane / 4 and lane / 4 + 8, then of the inputs 8 further. x [16 inputs, 16 channels] in shared memory.
template <typename T>
__device__ __forceinline__ void load_input_pairs(const T* x, Vector<T, 2> (&pairs)[4]) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  if constexpr (sizeof(T) == 2) {
    const int input = lane / 16 * 8 + lane % 8;
    uint32_t words[4];
    load_matrices_transposed(words, shared_address(x + input * kTileChannels + lane / 8 % 2 * 8));
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __builtin_bit_cast(Vector<T, 2>, words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* source = x + (i / 2 * 8 + lane % 4 * 2) * kTileChannels + lane / 4 + i % 2 * 8;
      pairs[i] = {source[0], source[kTileChannels]};
    }
  }
}

// weight_k x_k of a warp's channels and 16 inputs k as operand A. Lane k < 16 brings weight_k; x: load_input_pairs.
template <typename T>
__device__ __forceinline__ void weigh_factors(const T* x, float weight, uint32_t (&factors)[kFactorTerms][4]) {
  Vector<T, 2> pairs[4];
  load_input_pairs(x, pairs);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int input = half * 8 + static_cast<int>(threadIdx.x) % 4 * 2;
    const float first = __shfl_sync(kFullWarp, weight, input);
    const float second = __shfl_sync(kFullWarp, weight, input + 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Vector<T, 2>& pair = pairs[2 * half + r];
      uint32_t terms[kFactorTerms];
      split_pair(__fmul_rn(first, to_float(pair.values[0])), __fmul_rn(second, to_float(pair.values[1])), terms);
#pragma unroll
      for (int i = 0; i < kFactorTerms; ++i) factors[i][2 * half + r] = terms[i];
    }
  }
}

template <int kN>
class StateTile {
 public:
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& tile : values_) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
  }

  // From and to [16, N] contiguous in global memory, where nobody reads it again soon.
  template <typename State>
  __device__ __forceinline__ void load(const State* source) {
    source += lane_offset();
    for_each_piece([&](int p, int r, int offset) { set_piece(p, r, load_streamed(source + offset)); });
  }
  // Of State __half: values that round() has made fit.
  template <typename State>
  __device__ __forceinline__ void store(State* target) const {
    target += lane_offset();
    for_each_piece([&](int p, int r, int offset) {
      store_streamed(target + offset, Vector<State, kStatePiece>{from_float<State>(values_[2 * p][2 * r]),
                                                                 from_float<State>(values_[2 * p][2 * r + 1]),
                                                                 from_float<State>(values_[2 * p + 1][2 * r]),
                                                                 from_float<State>(values_[2 * p + 1][2 * r + 1])});
    });
  }

  template <typename State>
  __device__ __forceinline__ void set_piece(int p, int r, const Vector<State, kStatePiece>& piece) {
    values_[2 * p][2 * r] = to_float(piece.values[0]), values_[2 * p][2 * r + 1] = to_float(piece.values[1]);
    values_[2 * p + 1][2 * r] = to_float(piece.values[2]), values_[2 * p + 1][2 * r + 1] = to_float(piece.values[3]);
  }

  // To fp16's values. `element`: where the tile begins in the slot.
  __device__ __forceinline__ void round(const StateRounding& rounding, uint32_t element) {
    element += lane_offset();
    for_each_piece([&](int p, int r, int offset) {
      float piece[kStatePiece] = {values_[2 * p][2 * r], values_[2 * p][2 * r + 1], values_[2 * p + 1][2 * r],
                                  values_[2 * p + 1][2 * r + 1]};
      round_states(rounding, element + offset, piece);
      values_[2 * p][2 * r] = piece[0], values_[2 * p][2 * r + 1] = piece[1];
      values_[2 * p + 1][2 * r] = piece[2], values_[2 * p + 1][2 * r + 1] = piece[3];
    });
  }

  // S = decay S + sum_k (weight_k x_k) B_k^T. B [16, N] at input_offset of column_of; finite
  // for every input.
  template <typename T>
  __device__ __forceinline__ void fold(float decay, const uint32_t (&factors)[kFactorTerms][4], const T* B) {
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 2) {
      uint32_t inputs[kInputTerms<T>][4];
      load_inputs(B, tile, inputs);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sums[4] = {};
#pragma unroll
        for (int order = kFactorTerms - 1; order >= 0; --order) {  // the smallest products first
#pragma unroll
          for (int i = 0; i < kInputTerms<T> && i <= order; ++i) {
            multiply_add<__nv_bfloat16>(sums, factors[order - i], inputs[i][2 * half], inputs[i][2 * half + 1]);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) values_[tile + half][i] = fmaf(decay, values_[tile + half][i], sums[i]);
      }
    }
  }

  // The channel of which a lane has what is made for each; it shares it with the lane two away.
  static __device__ __forceinline__ int channel() { return lane() % 2 * 8 + lane() / 4; }
  static __device__ __forceinline__ bool is_owner() { return lane() / 2 % 2 == 0; }
  // A value of channel() to the lane that wants that of channel l % 16.
  static __device__ __forceinline__ float in_order(float value) {
    return __shfl_sync(kFullWarp, value, lane() % 8 * 4 + lane() % kTileChannels / 8);
  }

  // S C of channel().
  template <typename T>
  __device__ __forceinline__ float dot(const LaneQuery<T, kN>& C) const {
    float sums[2][2] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float query = to_float(C.pieces[tile / 2].values[tile % 2 * 2 + i % 2]);
        sums[i / 2][tile % 2] = fmaf(values_[tile][i], query, sums[i / 2][tile % 2]);
      }
    }
    // Four lanes share two channels: each keeps one of them and gives the other away.
    const float low = sums[0][0] + sums[0][1];
    const float high = sums[1][0] + sums[1][1];
    const bool is_high = lane() % 2 == 1;
    const float sum = (is_high ? high : low) + __shfl_xor_sync(kFullWarp, is_high ? low : high, 1);
    return sum + __shfl_xor_sync(kFullWarp, sum, 2);
  }

 private:
  template <typename State, int kSize>
  friend class TileLoad;
  static constexpr int kTiles = kN / 8;
  float values_[kTiles][4];  // columns 2 (lane % 4) and the next of row lane / 4, then of row lane / 4 + 8

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kWarpSize); }

  // Within [16, N].
  static __device__ __forceinline__ int lane_offset() { return lane() / 4 * kN + lane() % 4 * kStatePiece; }

  // visit(p, r, offset from the lane's first) for each piece: of states 16 p + 4 (lane % 4) and on, of row
  // lane / 4 + 8 r.
  template <typename Visit>
  static __device__ __forceinline__ void for_each_piece(Visit&& visit) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int p = 0; p < kTiles / 2; ++p) visit(p, r, 8 * r * kN + 16 * p);
    }
  }

  // Operand B of two tiles: inputs 0-7 and 8-15 of the first, then of the second.
  static __device__ __forceinline__ void load_inputs(const __nv_bfloat16* B, int tile, uint32_t (&inputs)[1][4]) {
    const int k = lane() % kTileInputs;
    load_matrices_transposed(inputs[0],
                             shared_address(B + input_offset<__nv_bfloat16, kN>(k, 8 * (tile + lane() / kTileInputs))));
  }
  template <typename T>
  static __device__ __forceinline__ void load_inputs(const T* B, int tile, uint32_t (&inputs)[kInputTerms<T>][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = i % 2 * 8 + lane() % 4 * 2;
      const int n = 8 * (tile + i / 2) + lane() / 4;
      uint32_t terms[kInputTerms<T>];
      split_pair(to_float(B[input_offset<T, kN>(k, n)]), to_float(B[input_offset<T, kN>(k + 1, n)]), terms);
#pragma unroll
      for (int term = 0; term < kInputTerms<T>; ++term) inputs[term][i] = terms[term];
    }
  }
};

// A tile's way to registers, begun long before it is used: what needs converting is converted at its end, so that
// nothing waits before.
template <typename State, int kN>
class TileLoad {
 public:
  // is_there: else zeros.
  __device__ __forceinline__ void begin(StateTile<kN>&, const State* source, bool is_there) {
    using Tile = StateTile<kN>;
    source += Tile::lane_offset();
    Tile::for_each_piece([&](int p, int r, int offset) {
      pieces_[r][p] = is_there ? load_streamed(source + offset) : Vector<State, kStatePiece>{};
    });
  }
  __device__ __forceinline__ void end(StateTile<kN>& state) const {
    StateTile<kN>::for_each_piece([&](int p, int r, int) { state.set_piece(p, r, pieces_[r][p]); });
  }

 private:
  Vector<State, kStatePiece> pieces_[2][kN / 16];
};

template <int kN>
class TileLoad<float, kN> {
 public:
  __device__ __forceinline__ void begin(StateTile<kN>& state, const float* source, bool is_there) {
    if (is_there) {
      state.load(source);
    } else {
      state.clear();
    }
  }
  __device__ __forceinline__ void end(StateTile<kN>&) const {}
};

}  // namespace headway::cuda
