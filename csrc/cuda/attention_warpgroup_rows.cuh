// A computing warpgroup of attention_warpgroup.cuh: 64 packed rows over all keys they see, one product at a time.
#pragma once

#include "cuda/attention_warpgroup.cuh"

namespace headway::cuda::prefill {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename T, int kDim>
class RowGroup {
 public:
  __device__ RowGroup(const WarpgroupParams& params, Shared<kDim>& shared, int group)
      : params_(params.prefill),
        box_keys_(params.box_keys),
        shared_(shared),
        group_(group),
        thread_(static_cast<int>(threadIdx.x) % kGroupThreads),
        lane_(thread_ % kWarpSize) {}

  __device__ void run() {
    QueryBlock block = next_block();
    if (block.num_packed > 0) copy_queries(block);
    while (block.num_packed > 0) {
      wait_copies<0>();
      wgmma::publish_operands();
      meet();
      place_rows(block);
      attend(block);
      // The last values are under way, and the queries have been read: time for the next block's.
      const QueryBlock next = next_block();
      meet();
      if (next.num_packed > 0) copy_queries(next);
      finish_values();
      write_rows(block);
      block = next;
    }
  }

 private:
  static constexpr int kScoreTiles = kKeys / 8;
  static constexpr int kSteps = kKeys / 16;
  using Queries = Panels<kDim, kGroupRows>;
  using Tile = prefill::Tile<kDim>;

  __device__ QueryBlock next_block() {
    shared_.blocks.wait_full(block_turn_);
    const QueryBlock block = shared_.blocks.slot(block_turn_);
    shared_.blocks.arrive_free(block_turn_);
    ++block_turn_;
    return block;
  }

  // Meets the warpgroup's threads. Barrier 0 is __syncthreads'.
  __device__ void meet() const { asm volatile("bar.sync %0, %1;" ::"r"(1 + group_), "n"(kGroupThreads) : "memory"); }

  // Meets the threads of all computing warpgroups.
  __device__ static void meet_all() {
    asm volatile("bar.sync %0, %1;" ::"n"(1 + kRowGroups), "n"(kRowThreads) : "memory");
  }

  __device__ void copy_queries(const QueryBlock& block) const {
    constexpr int kPieces = kDim / 8;
    const auto* q = static_cast<const T*>(params_.attention.q);
    const uint32_t target = shared_address(shared_.queries[group_].bytes);
#pragma unroll 4
    for (int i = thread_; i < kGroupRows * kPieces; i += kGroupThreads) {
      const int packed = block.first + group_ * kGroupRows + i / kPieces;
      const int channel = i % kPieces * 8;
      const bool is_valid = packed < block.num_packed;
      const T* source = is_valid ? q + packed_offset(params_, block, packed, params_.attention.q_stride) + channel : q;
      copy_async(target + Queries::offset(i / kPieces, channel), source, is_valid);
    }
    commit_copies();
  }

  // Packed index of the lane's first row; the other is 8 further.
  __device__ int packed_row(const QueryBlock& block) const {
    return block.first + group_ * kGroupRows + thread_ / kWarpSize * 16 + lane_ / 4;
  }

  // Rows beyond the last see one key, and are not written.
  __device__ void place_rows(const QueryBlock& block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int packed = packed_row(block) + 8 * half;
      limit_[half] = packed < block.num_packed ? keys_seen(params_, block, packed) : 1;
    }
    fewest_keys_ = __reduce_min_sync(kFullWarp, min(limit_[0], limit_[1]));
    state_ = SoftmaxState{};
  }

  // All scores, and all values but the last tile's, which are under way.
  __device__ __forceinline__ void attend(const QueryBlock& block) {
    const int num_tiles = num_key_tiles(block);
    float factor[2];
    start_scores();
    wgmma::wait_products<0>();
    finish_scores(0, factor);
    pack_weights();
    for (int n = 1; n < num_tiles; ++n) {
      start_values(block, n - 1);
      finish_values();
      start_scores();
      wgmma::wait_products<0>();
      finish_scores(n, factor);
      if (__any_sync(kFullWarp, factor[0] != 1.0f || factor[1] != 1.0f)) scale_rows(sums_, factor);
      pack_weights();
    }
    start_values(block, num_tiles - 1);
  }

  __device__ __forceinline__ void start_scores() {
    shared_.keys.wait_full(key_turn_);
    const uint64_t queries = wgmma::describe(shared_address(shared_.queries[group_].bytes));
    const uint64_t keys = shared_.keys.slot(key_turn_).describe_keys();
    wgmma::begin_products();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      constexpr int kPanelSteps = wgmma::kPanelColumns / 16;
      const int within = step % kPanelSteps * wgmma::kStepBytes<wgmma::Rows::kAlongSum>;
      wgmma::multiply_shared_128<T>(scores_, queries + ((step / kPanelSteps * Queries::kPanelBytes + within) >> 4),
                                    keys + ((step / kPanelSteps * Tile::kPanelBytes + within) >> 4), step > 0);
    }
    wgmma::commit_products();
  }

  // After the products: masks the scores of tile n and turns them into weights.
  __device__ __forceinline__ void finish_scores(int n, float (&factor)[2]) {
    wgmma::hold(scores_);
    if (lane_ == 0) shared_.keys.arrive_free(key_turn_);
    ++key_turn_;
    if ((n + 1) * kKeys > fewest_keys_) mask(n * kKeys);
    softmax_tile(scores_, state_, factor, params_.log2_scale);
  }

  __device__ __forceinline__ void mask(int first_key) {
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
      const int key = first_key + 8 * j + 2 * (lane_ % 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key + i % 2 >= limit_[i / 2]) scores_[j][i] = minus_infinity();
      }
    }
  }

  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) pack_probabilities<T>(weights_[j], scores_[2 * j], scores_[2 * j + 1]);
  }

  __device__ __forceinline__ void start_values(const QueryBlock& block, int n) {
    shared_.values.wait_full(value_turn_);
    if (n == block.row.kv_len / kKeys) clear_values_from(block.row.kv_len % kKeys);
    const uint64_t values = shared_.values.slot(value_turn_).describe_values();
    wgmma::hold(weights_);
    wgmma::begin_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma::multiply_across<T>(sums_, weights_[step], values + (step * Tile::kStepBytes >> 4), n > 0 || step > 0);
    }
    wgmma::commit_products();
  }

  __device__ __forceinline__ void finish_values() {
    wgmma::wait_products<0>();
    wgmma::hold(sums_);
    if (lane_ == 0) shared_.values.arrive_free(value_turn_);
    ++value_turn_;
  }

  // Slots of the row's last cache block beyond its last key may hold anything, and a weight of zero does not cure NaN.
  // All computing warpgroups share the work.
  __device__ void clear_values_from(int first) const {
    constexpr int kPieces = kDim / 8;
    const int end = (first + box_keys_ - 1) / box_keys_ * box_keys_;
    const uint32_t tile = shared_address(shared_.values.slot(value_turn_).bytes);
    for (int i = static_cast<int>(threadIdx.x); i < (end - first) * kPieces; i += kRowThreads) {
      const uint32_t piece = tile + Tile::offset(first + i / kPieces, i % kPieces * 8);
#pragma unroll
      for (uint32_t word = 0; word < 4; ++word) store_word(piece + 4 * word, 0);
    }
    wgmma::publish_operands();
    meet_all();
  }

  __device__ void write_rows(const QueryBlock& block) {
    finish_sums(state_);
    const int64_t stride = static_cast<int64_t>(params_.attention.num_heads) * kDim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int packed = packed_row(block) + 8 * half;
      if (packed >= block.num_packed) continue;
      const float factor = reciprocal_of(state_.sum[half]);
      T* target = static_cast<T*>(params_.attention.out) + packed_offset(params_, block, packed, stride);
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(target + 8 * j + 2 * (lane_ % 4)) =
            pack_pair<T>(__fmul_rn(sums_[j][2 * half], factor), __fmul_rn(sums_[j][2 * half + 1], factor));
      }
    }
  }

  const PrefillParams& params_;
  int box_keys_;
  Shared<kDim>& shared_;
  int group_;
  int thread_;
  int lane_;
  unsigned block_turn_ = 0;
  unsigned key_turn_ = 0;
  unsigned value_turn_ = 0;
  int limit_[2];     // keys that the lane's rows see
  int fewest_keys_;  // that any row of the warp sees
  SoftmaxState state_;
  float scores_[kScoreTiles][4];
  uint32_t weights_[kSteps][4];
  float sums_[kDim / 8][4];
};

#endif

}  // namespace headway::cuda::prefill
