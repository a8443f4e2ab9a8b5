// One warp's part of the decode attention: it streams its leaves' keys and values from device memory straight into the
// registers that feed the tensor cores, 16 keys at a time, always one load of each ahead. No shared memory and no other
// warp is involved, so nothing waits but for memory.
//
// The order of channels within a product's operands is free as long as both sides agree: lane l = 4 g + t loads 16
// bytes of key g (channels 8 t .. 8 t + 7 of every 32), and 16 bytes of values (channels 8 g .. 8 g + 7 of every 64) of
// the keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, whose neighbours a byte permutation pairs up.
#pragma once

#include "cuda/attention_decode.cuh"
#include "cuda/common/vector.cuh"

namespace headway::cuda {

inline constexpr int kLoadKeys = 16;

template <typename T, int kDim, bool kIsPadded>
class LeafWarp {
 public:
  static constexpr int kChannels = kDim < kMaxSumChannels ? kDim : kMaxSumChannels;  // that the warp sums
  static constexpr int kScoreChunks = kDim / 32;
  static constexpr int kSumChunks = kChannels / 64;
  static constexpr int kWords = kChannels / 16;  // of 4 floats: a lane's sums for one of its two rows

  __device__ LeafWarp(const DecodeParams& params, int lane)
      : params_(params), cache_(params.attention.cache), lane_(lane) {}

  // Loads the first keys and values of a leaf. places: shared address of where its keys lie, in 16 bytes.
  __device__ void start(uint32_t places, int count, int first_channel) {
    enter(places, count, first_channel);
    load_keys();
    load_values();
  }

  // From now on loads take from this leaf.
  __device__ void enter(uint32_t places, int count, int first_channel) {
    places_ = places;
    count_ = count;
    first_channel_ = first_channel;
  }

  __device__ void reset() {
    state_ = SoftmaxState{};
#pragma unroll
    for (auto& chunk : sums_) {
#pragma unroll
      for (auto& sum : chunk) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
    }
  }

  // Adds the 16 keys at hand, which begin at key `first`; `queries`: the fragment as store_queries left it.
  // limit: keys that the lane's two rows see. advance() moves to the next keys, or returns false if there are none.
  template <typename Advance>
  __device__ void add(const uint4* queries, int first, int fewest_keys, const int (&limit)[2], Advance advance) {
    float scores[2][4];
    score(queries, scores);
    const bool has_next = advance();
    if (has_next) load_keys();
    if (first + kLoadKeys > fewest_keys) mask(scores, first, limit);
    float factor[2];
    weigh(scores, factor);
    if (__any_sync(kFullWarp, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (auto& chunk : sums_) scale_rows(chunk, factor);
    }
    multiply_values(scores);
    if (has_next) load_values();
  }

  // To the next 16 keys of the leaf; false at its end.
  __device__ bool step() {
    places_ += kLoadKeys * sizeof(uint32_t);
    count_ -= kLoadKeys;
    return count_ > 0;
  }

  __device__ void finish() { finish_sums(state_); }
  __device__ const SoftmaxState& state() const { return state_; }

  // Word `index` of the lane's sums for row g + 8 half: channels 64 (index / 4) + 16 t + 4 (index % 4) and the next
  // three.
  template <int kHalf>
  __device__ float4 word(int index) const {
    const auto& chunk = sums_[index / 4];
    const int column = index % 4 / 2;
    const int i = index % 2 * 4;
    return make_float4(chunk[i][2 * kHalf + column], chunk[i + 1][2 * kHalf + column], chunk[i + 2][2 * kHalf + column],
                       chunk[i + 3][2 * kHalf + column]);
  }

 private:
  // The first channel of key `index` of the 16.
  __device__ const T* row_of(const void* cache, int index) const {
    uint32_t place;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(place) : "r"(places_ + index * 4) : "memory");
    return static_cast<const T*>(cache) + static_cast<uint64_t>(place) * 8;
  }

  __device__ uint4 load(const T* row, int channel) const {
    if (kIsPadded && channel >= params_.attention.head_dim) return make_uint4(0, 0, 0, 0);
    return load_once<128>(row + channel);
  }

  // Keys beyond the last are the last again: whatever they score is masked.
  __device__ void load_keys() {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const T* row = row_of(cache_.keys, 8 * j + lane_ / 4);
#pragma unroll
      for (int chunk = 0; chunk < kScoreChunks; ++chunk) keys_[j][chunk] = load(row, 32 * chunk + lane_ % 4 * 8);
    }
  }

  __device__ void load_values() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* row = row_of(cache_.values, lane_ % 4 * 2 + i % 2 + i / 2 * 8);
#pragma unroll
      for (int chunk = 0; chunk < kSumChunks; ++chunk) {
        const int channel = 64 * chunk + lane_ / 4 * 8;
        values_[i][chunk] = load(row, kDim > kMaxSumChannels ? first_channel_ + channel : channel);
      }
    }
  }

  // Of each key group two sums, of even and odd products, so that four chains run side by side.
  __device__ void score(const uint4* queries, float (&scores)[2][4]) const {
    float odd[2][4] = {};
#pragma unroll
    for (auto& each : scores) each[0] = each[1] = each[2] = each[3] = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kScoreChunks; ++chunk) {
      const uint4 upper = queries[(2 * chunk) * kWarpSize + lane_];
      const uint4 lower = queries[(2 * chunk + 1) * kWarpSize + lane_];
      const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
      const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        multiply_add<T>(scores[j], first, keys_[j][chunk].x, keys_[j][chunk].y);
        multiply_add<T>(odd[j], second, keys_[j][chunk].z, keys_[j][chunk].w);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[j][i] = __fadd_rn(scores[j][i], odd[j][i]);
    }
  }

  __device__ void mask(float (&scores)[2][4], int first, const int (&limit)[2]) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int key = first + 8 * j + 2 * (lane_ % 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key + i % 2 >= limit[i / 2]) scores[j][i] = minus_infinity();
      }
    }
  }

  // Scores -> exp2((score - largest) * log2_scale); `factor` is for the sums.
  __device__ void weigh(float (&scores)[2][4], float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = fmaxf(fmaxf(scores[0][2 * half], scores[0][2 * half + 1]),
                            fmaxf(scores[1][2 * half], scores[1][2 * half + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
      largest = fmaxf(largest, state_.largest[half]);
      factor[half] = rescale_factor(state_.largest[half], largest, params_.log2_scale);
      const float shift = -__fmul_rn(largest == minus_infinity() ? 0.0f : largest, params_.log2_scale);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[j][i] = fast_exp2(__fmaf_rn(scores[j][i], params_.log2_scale, shift));
          sum = __fadd_rn(sum, scores[j][i]);
        }
      }
      state_.sum[half] = __fmaf_rn(state_.sum[half], factor[half], sum);
      state_.largest[half] = largest;
    }
  }

  __device__ void multiply_values(const float (&weights)[2][4]) {
    uint32_t a[4];
    pack_probabilities<T>(a, weights[0], weights[1]);
#pragma unroll
    for (int chunk = 0; chunk < kSumChunks; ++chunk) {
      multiply_pairs(a, chunk, 0, values_[0][chunk].x, values_[1][chunk].x, values_[2][chunk].x, values_[3][chunk].x);
      multiply_pairs(a, chunk, 2, values_[0][chunk].y, values_[1][chunk].y, values_[2][chunk].y, values_[3][chunk].y);
      multiply_pairs(a, chunk, 4, values_[0][chunk].z, values_[1][chunk].z, values_[2][chunk].z, values_[3][chunk].z);
      multiply_pairs(a, chunk, 6, values_[0][chunk].w, values_[1][chunk].w, values_[2][chunk].w, values_[3][chunk].w);
    }
  }

  // Two neighbouring channels of four keys: the first two keys feed the operand's upper half.
  __device__ void multiply_pairs(const uint32_t (&a)[4], int chunk, int i, uint32_t first, uint32_t second,
                                 uint32_t third, uint32_t fourth) {
    constexpr uint32_t kLow = 0x5410;
    constexpr uint32_t kHigh = 0x7632;
    multiply_add<T>(sums_[chunk][i], a, __byte_perm(first, second, kLow), __byte_perm(third, fourth, kLow));
    multiply_add<T>(sums_[chunk][i + 1], a, __byte_perm(first, second, kHigh), __byte_perm(third, fourth, kHigh));
  }

  const DecodeParams& params_;
  const KvCache& cache_;
  int lane_;
  uint32_t places_ = 0;  // shared address, for the next load
  int count_ = 0;  // keys left to load
  int first_channel_ = 0;  // of the values
  uint4 keys_[2][kScoreChunks];
  uint4 values_[4][kSumChunks];
  SoftmaxState state_;
  float sums_[kSumChunks][8][4];
};

}  // namespace headway::cuda
