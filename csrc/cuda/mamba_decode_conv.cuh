// The causal convolution of a decode step over slot windows: a thread's channels, over a row's new tokens.
//
// Raw columns come from the row's ring (core/state_base.h says how long they stay) or, in the first step after a
// prompt, from the convolution state at the base.
#pragma once

#include <type_traits>

#include "cuda/common/math.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/mamba_decode.h"

namespace headway::cuda {

inline constexpr int kTaps = 4;  // of every published Mamba-2
inline constexpr int kPieceWidth = 4;  // channels a thread where not said otherwise

// Neighbouring channels, packed as in memory: nvcc gives each two-byte element of a Vector a register of its own, and a
// store of its own.
template <typename T, int kWidth = kPieceWidth>
class Piece {
 public:
  // source: aligned to the piece's bytes, likewise below.
  static __device__ __forceinline__ Piece load(const T* source) {
    Piece piece;
    piece.words_ = *reinterpret_cast<const Words*>(source);
    return piece;
  }
  __device__ __forceinline__ void store(T* target) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint64_t*>(target)[i] = words_.values[i];
  }

  __device__ __forceinline__ float at(int i) const {
    const auto half = static_cast<uint32_t>(words_.values[i / kPerWord] >> (shift(i) & 32));
    if constexpr (sizeof(T) == 4) return __uint_as_float(half);
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      return __uint_as_float(i % 2 == 0 ? half << 16 : half & 0xffff0000u);
    return to_float(__builtin_bit_cast(T, static_cast<Bits>(half >> (shift(i) & 16))));
  }
  // Rounds to T. The piece was cleared and is set once.
  __device__ __forceinline__ void set(int i, float value) {
    words_.values[i / kPerWord] |= static_cast<uint64_t>(__builtin_bit_cast(Bits, from_float<T>(value))) << shift(i);
  }

 private:
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  static constexpr int kPerWord = 8 / static_cast<int>(sizeof(T));
  static constexpr int kWords = kWidth / kPerWord;
  using Words = Vector<uint64_t, kWords>;

  static __device__ constexpr int shift(int i) { return i % kPerWord * 8 * static_cast<int>(sizeof(T)); }

  Words words_{};
};

// silu(bias + weight . window), rounded to T as the convolution's output is. Never written by a step.
template <typename T, int kWidth = kPieceWidth>
struct Filter {
  Piece<T, kWidth> weights[kTaps];
  Piece<T, kWidth> bias;

  __device__ __forceinline__ Filter(const MambaDecodeParams& params, int64_t channel) {
    const T* source = static_cast<const T*>(params.conv_weight) + channel;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) weights[tap] = Piece<T, kWidth>::load(source + tap * conv_channels(params));
    bias = {};
    if (params.conv_bias != nullptr) bias = Piece<T, kWidth>::load(static_cast<const T*>(params.conv_bias) + channel);
  }

  __device__ __forceinline__ Piece<T, kWidth> apply(const Piece<T, kWidth> (&window)[kTaps]) const {
    Piece<T, kWidth> out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      float sum = bias.at(i);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        sum = fmaf(weights[tap].at(i), window[tap].at(i), sum);
      }
      out.set(i, sizeof(T) == 4 ? silu(sum) : fast_silu(sum));
    }
    return out;
  }
};

// One piece of channels of conv_dim: convolves the row's new tokens and keeps their raw columns.
template <typename T, int kWidth = kPieceWidth>
struct PieceStep {
  const MambaDecodeParams& params;
  const SlotRow& row;
  int64_t channel;
  bool is_kept;  // in the slot; one block's task where several convolve the same
  int start_entry = row.start % params.log.num_raw;

  // The ring's column of position start + offset, offset from -num_raw to num_raw.
  __device__ __forceinline__ T* raw_column(int offset) const {
    int entry = start_entry + offset;
    if (entry < 0) entry += params.log.num_raw;
    if (entry >= params.log.num_raw) entry -= params.log.num_raw;
    return static_cast<T*>(params.log.raw) + row.slot * params.log.raw_stride + entry * conv_channels(params) + channel;
  }
  __device__ __forceinline__ T* base_column(int tap) const {
    return static_cast<T*>(params.conv_state) + row.slot * params.conv_state_stride + tap * conv_channels(params) +
           channel;
  }
  __device__ __forceinline__ const T* new_column(int i) const {
    return static_cast<const T*>(params.columns) + (row.token + i) * params.token_stride + channel;
  }

  // emit(i, piece) gets each new token's output.
  template <typename Emit>
  __device__ __forceinline__ void run(const Filter<T, kWidth>& filter, Emit&& emit) const {
    Piece<T, kWidth> window[kTaps];
    load_past(window);
    window[kTaps - 1] = Piece<T, kWidth>::load(new_column(0));
    if (is_kept) keep_past(window);
#pragma unroll 1
    for (int i = 0; i < row.num_tokens; ++i) {
      Piece<T, kWidth> next = {};
      if (i + 1 < row.num_tokens) next = Piece<T, kWidth>::load(new_column(i + 1));
      emit(i, filter.apply(window));
      if (is_kept) window[kTaps - 1].store(raw_column(i));
#pragma unroll
      for (int tap = 0; tap + 1 < kTaps; ++tap) window[tap] = window[tap + 1];
      window[kTaps - 1] = next;
    }
    if (is_kept && row.next_base > row.base) move_base();
  }

  // The same for rows of one token, which it returns.
  __device__ __forceinline__ Piece<T, kWidth> run_one(const Filter<T, kWidth>& filter) const {
    Piece<T, kWidth> window[kTaps];
    load_past(window);
    window[kTaps - 1] = Piece<T, kWidth>::load(new_column(0));
    if (is_kept) {
      keep_past(window);
      window[kTaps - 1].store(raw_column(0));
      if (row.next_base > row.base) move_base();
    }
    return filter.apply(window);
  }

  __device__ __forceinline__ void load_past(Piece<T, kWidth> (&window)[kTaps]) const {
    const bool is_at_base = row.start == row.base;
#pragma unroll
    for (int tap = 0; tap + 1 < kTaps; ++tap) {
      const int offset = tap - (kTaps - 1);
      const T* column = is_at_base ? base_column(tap) : raw_column(offset);
      window[tap] = {};
      if (row.start + offset >= 0) window[tap] = Piece<T, kWidth>::load(column);
    }
  }

  // The first step after a prompt: later ones find their columns in the ring.
  __device__ __forceinline__ void keep_past(const Piece<T, kWidth> (&window)[kTaps]) const {
    if (row.start != row.base) return;
#pragma unroll
    for (int tap = 0; tap + 1 < kTaps; ++tap) {
      const int position = row.start - (kTaps - 1) + tap;
      if (position >= 0) window[tap].store(raw_column(position - row.start));
    }
  }

  __device__ __forceinline__ void move_base() const {
#pragma unroll
    for (int tap = 0; tap + 1 < kTaps; ++tap) {
      const int position = row.next_base - (kTaps - 1) + tap;
      const int offset = position - row.start;
      Piece<T, kWidth>::load(offset >= 0 ? new_column(offset) : raw_column(offset)).store(base_column(tap));
    }
  }
};

}  // namespace headway::cuda
