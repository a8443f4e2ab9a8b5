// One compute warp of the decode kernel, and the shared memory in which the warps of a block meet. Each warp scores a
// quarter of a step's keys; the weights meet in shared memory; each multiplies all of them with a quarter of the
// channels, so that no accumulator is ever merged across warps.
#pragma once

#include "cuda/attention_stream.cuh"

namespace headway::cuda {

inline constexpr int kComputeThreads = kDecodeWarps * kWarpSize;

__device__ __forceinline__ void sync_compute_warps() {
  asm volatile("bar.sync 1, %0;" ::"n"(kComputeThreads) : "memory");
}

// Two blocks share a multiprocessor unless an item takes many packed rows.
template <int kDim, int kFragments>
inline constexpr int kResidentBlocks = kFragments <= 2 && kDim * kFragments < 512 ? 2 : 1;

// A block's shared memory, as addresses and pointers.
template <int kDim, int kFragments>
struct DecodeMemory {
  static constexpr int kRows = kFragments * kFragmentRows;
  static constexpr int kWeightStride = (kStepKeys<kDim> / 8 + 1) * 16;  // bytes; odd in 16-byte pieces
  static constexpr int kQueryBytes = kRows * TileRows<kDim>::kStrideBytes;
  static constexpr int kFixedBytes = kQueryBytes + kRows * kWeightStride + 2 * kRows * 16 + 16 + 256;
  static constexpr int kBudget = 226 * 1024 / kResidentBlocks<kDim, kFragments> - 2048 - kFixedBytes;
  static constexpr int kSlots = kBudget / kSlotBytes<kDim> < 12 ? kBudget / kSlotBytes<kDim> : 12;
  static constexpr int kRingBytes = kSlots * kSlotBytes<kDim>;
  static constexpr int kBytes = kRingBytes + kFixedBytes;  // then the prefix sums of the rows' items
  using Ring = SlotRing<kDim, kSlots>;

  Ring ring;
  uint32_t queries;  // [kRows, kDim]
  uint32_t weights;  // [kRows, kStepKeys]
  float* largest;  // [kRows, kDecodeWarps] of each warp's scores
  float* sums;  // [kRows, kDecodeWarps] of each warp's weights
  int32_t* num_spans;
  int32_t* prefix;  // [R + 1]

  __device__ explicit DecodeMemory(unsigned char* base)
      : ring{shared_address(base), shared_address(base + kBytes - 256)},
        queries(ring.slots + kRingBytes),
        weights(queries + kQueryBytes),
        largest(reinterpret_cast<float*>(base + kRingBytes + kQueryBytes + kRows * kWeightStride)),
        sums(largest + kRows * kDecodeWarps),
        num_spans(reinterpret_cast<int32_t*>(sums + kRows * kDecodeWarps)),
        prefix(reinterpret_cast<int32_t*>(base + kBytes)) {}
};

// The part of one compute warp: its place in the ring, and what its lanes hold of an item.
template <typename T, int kDim, int kFragments>
class DecodeWarp {
 public:
  using Memory = DecodeMemory<kDim, kFragments>;

  __device__ DecodeWarp(const DecodeParams& params, const Memory& memory)
      : params_(params),
        memory_(memory),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize) {}

  __device__ void attend(const DecodeItem& item, int64_t index, Cut cut) {
    begin_item(item.rows);
    const int span_keys = kStepKeys<kDim> * kSpanSteps;
    reset();
    for (int first = item.begin; first < item.end; first += kStepKeys<kDim>) {
      add_step(item, first);
      const int next = first + kStepKeys<kDim>;
      if (cut == Cut::kRows && (next % span_keys == 0 || next >= item.end)) {
        close_span(first < span_keys, next >= item.end);
      }
    }
    if (cut == Cut::kRows || num_cuts(params_, item.rows.row, cut) == 1) {
      write_output(item.rows);
    } else {
      write_partial(item.rows, index);
    }
  }

 private:
  static constexpr int kStep = kStepKeys<kDim>;
  static constexpr int kWarpKeys = kStep / kDecodeWarps;
  static constexpr int kWarpTiles = kWarpKeys / 8;
  static constexpr int kPairs = kDim / 16;  // 16 channels: what one load of values feeds
  static constexpr int kWarpPairs = (kPairs + kDecodeWarps - 1) / kDecodeWarps;
  static constexpr int kTogether = kFragments < 2 ? 1 : 2;  // fragments that share a load of values

  __device__ void reset() {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      state_[f] = SoftmaxState{};
#pragma unroll
      for (auto& sum : sums_[f]) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
    }
  }

  // Queries to shared memory; the keys each of the lane's rows sees.
  __device__ void begin_item(const PackedRows& rows) {
    constexpr int kPieces = TileRows<kDim>::kPieces;
    num_fragments_ = rows.num_fragments();
    const auto* q = static_cast<const T*>(params_.attention.q);
    for (int i = static_cast<int>(threadIdx.x); i < num_fragments_ * kFragmentRows * kPieces; i += kComputeThreads) {
      const int row = i / kPieces;
      const int piece = i % kPieces;
      const bool is_valid = row < rows.count && piece * 8 < params_.attention.head_dim;
      const T* source = is_valid ? q + packed_offset(params_, rows, row, params_.attention.q_stride) + piece * 8 : q;
      copy_async(TileRows<kDim>::piece(memory_.queries, row, piece), source, is_valid);
    }
    commit_copies();
    fewest_keys_ = rows.row.first_position + rows.first / params_.group + 1;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int index = f * kFragmentRows + lane_ / 4 + 8 * half;
        limit_[f][half] = index < rows.count ? rows.row.first_position + (rows.first + index) / params_.group + 1 : 0;
      }
    }
    wait_copies<0>();
    sync_compute_warps();
  }

  __device__ void add_step(const DecodeItem& item, int first) {
    const int num_keys = min(kStep, item.end - first);
    const int num_slots = (num_keys + kSlotKeys<kDim> - 1) / kSlotKeys<kDim>;
    float scores[kFragments][kWarpTiles][4] = {};
    score(scores, num_slots);
    release(num_slots);
    if (first + kStep > fewest_keys_) mask(scores, first + warp_ * kWarpKeys);
    publish_largest(scores);
    sync_compute_warps();
    SoftmaxState step[kFragments];
    weigh(scores, step);
    sync_compute_warps();
#pragma unroll
    for (int f = 0; f < kFragments; f += kTogether) {
      if (f < num_fragments_) add_values(f, step, num_keys);
    }
    release(num_slots);
  }

  // Lets the streaming warp have the next slots.
  __device__ void release(int num_slots) {
    __syncwarp();
    if (lane_ < num_slots) memory_.ring.empty(stage_ + lane_).arrive();
    stage_ += num_slots;
  }

  __device__ void score(float (&scores)[kFragments][kWarpTiles][4], int num_slots) {
    const int slot = warp_ * 2 / kDecodeWarps;
    if (slot >= num_slots) return;
    const int stage = stage_ + slot;
    memory_.ring.full(stage).wait(Memory::Ring::parity(stage));
    const int quarter = lane_ / 8;
    const uint32_t keys = TileRows<kDim>::piece(memory_.ring.slot(stage), warp_ % (kDecodeWarps / 2) * kWarpKeys, 0);
#pragma unroll
    for (int channels = 0; channels < kPairs; ++channels) {
      uint32_t query[kFragments][4];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const int row = f * kFragmentRows + quarter % 2 * 8 + lane_ % 8;
        if (f < num_fragments_) {
          load_matrices(query[f], TileRows<kDim>::piece(memory_.queries, row, 2 * channels + quarter / 2));
        }
      }
#pragma unroll
      for (int j = 0; j < kWarpTiles / 2; ++j) {
        uint32_t b[4];
        load_matrices(b, TileRows<kDim>::piece(keys, 16 * j + quarter / 2 * 8 + lane_ % 8, 2 * channels + quarter % 2));
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          if (f >= num_fragments_) continue;
          multiply_add<T>(scores[f][2 * j], query[f], b[0], b[1]);
          multiply_add<T>(scores[f][2 * j + 1], query[f], b[2], b[3]);
        }
      }
    }
  }

  __device__ void mask(float (&scores)[kFragments][kWarpTiles][4], int first) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int n = 0; n < kWarpTiles; ++n) {
        const int key = first + 8 * n + 2 * (lane_ % 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (key + i % 2 >= limit_[f][i / 2]) scores[f][n][i] = minus_infinity();
        }
      }
    }
  }

  // Index of the lane's row in the [kRows, kDecodeWarps] arrays.
  __device__ int shared_row(int f, int half) const { return f * kFragmentRows + lane_ / 4 + 8 * half; }

  __device__ void publish_largest(const float (&scores)[kFragments][kWarpTiles][4]) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = minus_infinity();
#pragma unroll
        for (int n = 0; n < kWarpTiles; ++n) {
          largest = fmaxf(largest, fmaxf(scores[f][n][2 * half], scores[f][n][2 * half + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
        if (lane_ % 4 == 0) memory_.largest[shared_row(f, half) * kDecodeWarps + warp_] = largest;
      }
    }
  }

  // Scores -> exp2((score - the step's largest) * log2_scale), to shared memory; the sums of each warp's likewise.
  __device__ void weigh(const float (&scores)[kFragments][kWarpTiles][4], SoftmaxState (&step)[kFragments]) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      if (f >= num_fragments_) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = shared_row(f, half);
        const float4 each = *reinterpret_cast<const float4*>(memory_.largest + row * kDecodeWarps);
        const float largest = fmaxf(fmaxf(each.x, each.y), fmaxf(each.z, each.w));
        const float reference = largest == minus_infinity() ? 0.0f : largest;
        const float shift = -__fmul_rn(reference, params_.log2_scale);
        const uint32_t weights =
            memory_.weights + row * Memory::kWeightStride + (warp_ * kWarpKeys + 2 * (lane_ % 4)) * 2;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kWarpTiles; ++n) {
          const float first = fast_exp2(__fmaf_rn(scores[f][n][2 * half], params_.log2_scale, shift));
          const float second = fast_exp2(__fmaf_rn(scores[f][n][2 * half + 1], params_.log2_scale, shift));
          sum = __fadd_rn(sum, __fadd_rn(first, second));
          store_word(weights + n * 16, pack_pair<T>(first, second));
        }
        sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 1));
        sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 2));
        if (lane_ % 4 == 0) memory_.sums[row * kDecodeWarps + warp_] = sum;
        step[f].largest[half] = largest;
      }
    }
  }

  // Folds a step's product with the values, of fragments f .. f + kTogether - 1 and the warp's channels.
  __device__ void add_values(int f, SoftmaxState (&step)[kFragments], int num_keys) {
    float product[kTogether][2 * kWarpPairs][4] = {};
    const int quarter = lane_ / 8;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      if (slot * kSlotKeys<kDim> >= num_keys) break;
      const int stage = stage_ + slot;
      memory_.ring.full(stage).wait(Memory::Ring::parity(stage));
      const uint32_t values = memory_.ring.slot(stage);
#pragma unroll
      for (int j = 0; j < kSlotKeys<kDim> / 16; ++j) {
        if (slot * kSlotKeys<kDim> + 16 * j >= num_keys) break;
        uint32_t weights[kTogether][4];
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
          const int row = (f + t) * kFragmentRows + quarter % 2 * 8 + lane_ % 8;
          const int column = (slot * kSlotKeys<kDim> + 16 * j) * 2 + quarter / 2 * 16;
          load_matrices(weights[t], memory_.weights + row * Memory::kWeightStride + column);
        }
#pragma unroll
        for (int p = 0; p < kWarpPairs; ++p) {
          const int pair = warp_ * kWarpPairs + p;
          if (kPairs % kDecodeWarps != 0 && pair >= kPairs) break;
          uint32_t b[4];
          load_values<kDim>(b, TileRows<kDim>::piece(values, 16 * j, 0), pair, lane_);
#pragma unroll
          for (int t = 0; t < kTogether; ++t) {
            multiply_add<T>(product[t][2 * p], weights[t], b[0], b[1]);
            multiply_add<T>(product[t][2 * p + 1], weights[t], b[2], b[3]);
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTogether; ++t) fold(f + t, product[t], step[f + t]);
  }

  __device__ void fold(int f, const float (&product)[2 * kWarpPairs][4], SoftmaxState& step) {
    SoftmaxState& state = state_[f];
    MergeFactors factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 each = *reinterpret_cast<const float4*>(memory_.sums + shared_row(f, half) * kDecodeWarps);
      const float sum = __fadd_rn(__fadd_rn(__fadd_rn(each.x, each.y), each.z), each.w);
      factors[half] = merge_factors(state.largest[half], step.largest[half], params_.log2_scale);
      state.largest[half] = factors[half].largest;
      state.sum[half] = merge(state.sum[half], sum, factors[half]);
    }
#pragma unroll
    for (int n = 0; n < 2 * kWarpPairs; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_[f][n][i] = merge(sums_[f][n][i], product[n][i], factors[i / 2]);
    }
  }

  // Where partial results have no room: folds a span into what is parked, and parks the result unless it is the last.
  __device__ void close_span(bool is_first, bool is_last) {
    if (is_first && is_last) return;
    const RunningTotal total = running_total(params_.totals);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int word = f * (2 * kWarpPairs + 1);
      if (!is_first) merge_total(total, word, sums_[f], state_[f], params_.log2_scale);
      if (!is_last) save_total(total, word, sums_[f], state_[f]);
    }
    if (!is_last) reset();
  }

  // Calls body(packed row, channel, sums of it and the next, state's index) for the lane's part of the result.
  template <typename Body>
  __device__ void for_each_pair(const PackedRows& rows, Body body) const {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = shared_row(f, half);
        if (row >= rows.count) continue;
#pragma unroll
        for (int n = 0; n < 2 * kWarpPairs; ++n) {
          const int channel = 16 * warp_ * kWarpPairs + 8 * n + 2 * (lane_ % 4);
          if (channel >= params_.attention.head_dim) continue;
          body(row, channel, sums_[f][n][2 * half], sums_[f][n][2 * half + 1], state_[f].sum[half]);
        }
      }
    }
  }

  __device__ void write_output(const PackedRows& rows) const {
    const int64_t stride = static_cast<int64_t>(params_.attention.num_heads) * params_.attention.head_dim;
    auto* out = static_cast<T*>(params_.attention.out);
    for_each_pair(rows, [&](int row, int channel, float first, float second, float sum) {
      const float factor = reciprocal_of(sum);
      *reinterpret_cast<uint32_t*>(out + packed_offset(params_, rows, row, stride) + channel) =
          pack_pair<T>(__fmul_rn(first, factor), __fmul_rn(second, factor));
    });
  }

  __device__ void write_partial(const PackedRows& rows, int64_t index) const {
    const Partial partial = partial_of(params_, index);
    for_each_pair(rows, [&](int row, int channel, float first, float second, float) {
      *reinterpret_cast<float2*>(partial.sums + row * params_.attention.head_dim + channel) =
          make_float2(first, second);
    });
    if (warp_ != 0 || lane_ % 4 != 0) return;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (shared_row(f, half) >= rows.count) continue;
        partial.largest[shared_row(f, half)] = state_[f].largest[half];
        partial.totals[shared_row(f, half)] = state_[f].sum[half];
      }
    }
  }

  const DecodeParams& params_;
  const Memory& memory_;
  int lane_;
  int warp_;
  int stage_ = 0;
  int num_fragments_ = 0;
  int fewest_keys_ = 0;  // that any of the item's packed rows sees
  int limit_[kFragments][2];
  SoftmaxState state_[kFragments];
  float sums_[kFragments][2 * kWarpPairs][4];
};

}  // namespace headway::cuda
