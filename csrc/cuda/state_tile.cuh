// 16 channels of a slot's state in a warp's registers, laid out as the accumulators of m16n8k16 products: rows are
// channels, columns are states. Knows nothing of rows, slots and windows.
//
// Folding 16 inputs, sum_k (w_k x_k) B_k^T, is a product on the tensor cores. They take bf16, so each fp32 factor goes
// in as a sum of bf16 terms (bf16 itself is one, fp16 two, fp32 three) and every product of terms above 2^-24 of the
// whole is made, which keeps fp32's accuracy (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial
// intelligence datatype for higher-precision computations", 2019). The state itself is scaled and added to in fp32.
#pragma once

#include "cuda/common/accumulators.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"

namespace headway::cuda {

inline constexpr int kTileChannels = 16;
inline constexpr int kTileInputs = 16;
inline constexpr int kFactorTerms = 3;  // of an fp32 factor

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

// In shared memory, element `column` of row `row` of the inputs' B [16, N]: 16-byte pieces swizzled, so that neither
// ldmatrix nor the copies meet a bank twice.
template <typename T, int kN>
__device__ __forceinline__ int input_offset(int row, int column) {
  constexpr int kWidth = kVectorWidth<T>;
  return row * kN + ((column / kWidth) ^ (row & 7)) * kWidth + column % kWidth;
}

// The same for a state [16, N].
template <int kN>
__device__ __forceinline__ int state_offset(int row, int column) {
  return row * kN + (column ^ ((row & 3) << 3));
}

template <int kN>
class StateTile {
 public:
  // From shared memory, at state_offset.
  __device__ __forceinline__ void load(const float* memory) {
    const float* swizzled[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) swizzled[i] = memory + state_offset<kN>(row(), column(i));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto pair = *reinterpret_cast<const float2*>(swizzled[tile % 4] + 8 * r * kN + tile / 4 * 32);
        values_[tile][2 * r] = pair.x, values_[tile][2 * r + 1] = pair.y;
      }
    }
  }

  // To global memory, [16, N] contiguous.
  __device__ __forceinline__ void store(float* target) const { store_accumulators(values_, target); }

  // S = decay S + sum_k (weight_k x_k) B_k^T. Lane k < 16 brings weight_k; x is [16, 16] (input, channel), B [16, N]
  // at input_offset. B of inputs of weight 0 is finite.
  template <typename T>
  __device__ __forceinline__ void fold(float decay, float weight, const T* x, const T* B) {
    uint32_t factors[kFactorTerms][4];
    split_factors(weight, x, factors);
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

  // S C; lane l gets that of channel l % 16.
  template <typename T>
  __device__ __forceinline__ float dot(const T* C) const {
    float sums[2][2] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float query[2];
      load_floats<T, 2>(C + column(tile), query);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i / 2][tile % 2] = fmaf(values_[tile][i], query[i % 2], sums[i / 2][tile % 2]);
    }
    const int source = lane() % 8 * 4;
    const float low = __shfl_sync(kFullWarp, warp_sum<4>(sums[0][0] + sums[0][1]), source);
    const float high = __shfl_sync(kFullWarp, warp_sum<4>(sums[1][0] + sums[1][1]), source);
    return lane() % kTileChannels < 8 ? low : high;
  }

 private:
  static constexpr int kTiles = kN / 8;
  float values_[kTiles][4];  // of columns 8 tile + column(0) and the next: row(), then row() + 8

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  static __device__ __forceinline__ int row() { return lane() / 4; }
  static __device__ __forceinline__ int column(int tile) { return 8 * tile + lane() % 4 * 2; }

  // weight_k x_k, as operand A.
  template <typename T>
  static __device__ __forceinline__ void split_factors(float weight, const T* x, uint32_t (&factors)[kFactorTerms][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = 8 * half + lane() % 4 * 2;
      const float first = __shfl_sync(kFullWarp, weight, k);
      const float second = __shfl_sync(kFullWarp, weight, k + 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const T* value = x + k * kTileChannels + row() + 8 * r;
        uint32_t terms[kFactorTerms];
        split_pair(first == 0.0f ? 0.0f : first * to_float(value[0]),
                   second == 0.0f ? 0.0f : second * to_float(value[kTileChannels]), terms);
#pragma unroll
        for (int i = 0; i < kFactorTerms; ++i) factors[i][2 * half + r] = terms[i];
      }
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
      const int n = 8 * (tile + i / 2) + row();
      uint32_t terms[kInputTerms<T>];
      split_pair(to_float(B[input_offset<T, kN>(k, n)]), to_float(B[input_offset<T, kN>(k + 1, n)]), terms);
#pragma unroll
      for (int term = 0; term < kInputTerms<T>; ++term) inputs[term][i] = terms[term];
    }
  }
};

}  // namespace headway::cuda
