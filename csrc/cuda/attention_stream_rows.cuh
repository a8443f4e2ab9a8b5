// A computing warpgroup of attention_stream.cuh: up to 64 packed rows over the keys of the block's piece, and the
// folding of their sums along the tree of attention_decode.cuh, in registers but for whole rows
// (attention_stream_sums.cuh).
#pragma once

#include "cuda/attention_stream_sums.cuh"

namespace headway::cuda::stream {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename T, int kDim, int kGroups>
class RowGroup {
 public:
  // next: the lane that takes the spans after this one's, where they take turns.
  __device__ RowGroup(const StreamParams& params, stream::Lane<kDim, kGroups>& shared,
                      stream::Lane<kDim, kGroups>& next)
      : params_(params.decode),
        box_keys_(params.box_keys),
        num_chains_(params.num_chains),
        chain_octets_(params.chain_octets),
        shared_(shared),
        next_turn_{shared_address(&next.turn)},
        piece_(shared.piece),
        warpgroup_(static_cast<int>(threadIdx.x) / kGroupThreads),
        group_(warpgroup_ % kGroups),
        thread_(static_cast<int>(threadIdx.x) % kGroupThreads),
        lane_(thread_ % kWarpSize) {}

  __device__ void run() {
    for (int index = piece_.begin; index < piece_.end;) {
      enter(index);
      const int end = piece_.end_of_run(step(), index);
      for (int position = step().position; index < end; ++index, ++position) {
        if (step().num_packed <= 0 || !piece_.takes(num_spans_ + position / kSpanSteps)) continue;
        RowSums sums{};
        attend(position * kStreamStepKeys, sums);
        if (num_halves_ > 0) fold(sums, position, index);
        if (piece_.takes_turns() && ends_span(position)) next_turn_.arrive();
      }
      num_spans_ += (step().all.count + kSpanSteps - 1) / kSpanSteps;
    }
  }

 private:
  static constexpr int kScoreTiles = kStreamStepKeys / 8;
  static constexpr int kSumTiles = kDim / 8;
  static constexpr int kWeightSteps = kStreamStepKeys / 16;
  using Queries = Panels<kDim, kStreamRows>;
  using Tile = stream::Tile<kDim>;
  using RowSums = stream::RowSums<kDim>;

  // Meets the warpgroup's threads. Barrier 0 is __syncthreads'.
  __device__ void meet() const {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + warpgroup_), "n"(kGroupThreads) : "memory");
  }

  // Meets the threads of the lane's warpgroups.
  __device__ void meet_lane() const {
    if constexpr (kGroups == 1) return meet();
    asm volatile("bar.sync %0, %1;" ::"n"(1 + kMaxStreamGroups), "n"(kGroups * kGroupThreads) : "memory");
  }

  __device__ const Step& step() const { return shared_.steps[group_]; }

  // Rows -------------------------------------------------------------------------------------------------------------

  // Step `index` is the first of its row and key head in the piece: finds it and fetches the queries.
  __device__ void enter(int index) {
    meet();  // nobody reads the step and the queries before any more
    if (thread_ < kWarpSize) {
      const Step found = find_step(params_, piece_.list, piece_.prefix, index);
      if (lane_ == 0) shared_.steps[group_] = found;
    }
    meet();
    copy_queries();
    place_rows();
    wait_copies<0>();
    wgmma::publish_operands();
    meet();
  }

  __device__ void copy_queries() const {
    constexpr int kPieces = kDim / 8;
    const auto* q = static_cast<const T*>(params_.attention.q);
    const uint32_t target = shared_address(shared_.queries[group_].bytes);
#pragma unroll 4
    for (int i = thread_; i < kStreamRows * kPieces; i += kGroupThreads) {
      const int tile_row = i / kPieces;
      const int row = packed_row(tile_row / 16, tile_row % 8, tile_row / 8 % 2);
      const int channel = i % kPieces * 8;
      const bool is_valid = row < step().num_packed;
      const T* source = is_valid ? q + fragment_offset(params_, step(), row, params_.attention.q_stride) + channel : q;
      copy_async(target + Queries::offset(i / kPieces, channel), source, is_valid);
    }
    commit_copies();
  }

  // Of the fragment's rows the one at `index` of the eight in either half of a warp's part of the product. Few rows go
  // to first halves alone, which spares their warps the other's weights, and to different warps in either warpgroup.
  __device__ int packed_row(int warp, int index, int half) const {
    const int place = (warp + kGroupWarps / 2 * warpgroup_) % kGroupWarps;
    return group_ * kStreamRows + half * kStreamRows / 2 + 8 * place + index;
  }
  // Of the lane.
  __device__ int packed_row(int half) const { return packed_row(thread_ / kWarpSize, lane_ / 4, half); }

  // The halves in which the warp has rows.
  template <typename Act>
  __device__ __forceinline__ void for_halves(Act act) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half >= num_halves_) break;
      act(half);
    }
  }

  // Rows that are none have no limit, and are not written.
  __device__ void place_rows() {
    num_halves_ = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = packed_row(half);
      if (row - lane_ / 4 < step().num_packed) num_halves_ = half + 1;
      const int query = (step().first_packed + row) / params_.group;
      limit_[half] = row < step().num_packed ? step().row.first_position + query + 1 : INT32_MAX;
    }
    fewest_keys_ = __reduce_min_sync(kFullWarp, min(limit_[0], limit_[1]));
  }

  // A step ------------------------------------------------------------------------------------------------------------

  // Keys from `first` on.
  __device__ void attend(int first, RowSums& sums) {
    float scores[kScoreTiles][4] = {};
    multiply_queries(scores);
    uint32_t weights[kWeightSteps][4] = {};
    if (num_halves_ > 0) weigh(first, scores, weights, sums.state);
    multiply_values(first, weights, sums.values);
  }

  __device__ __forceinline__ void multiply_queries(float (&scores)[kScoreTiles][4]) {
    wait_tiles();
    wgmma::begin_products();
    add_scores<0>(scores);
    add_scores<1>(scores);
    wgmma::commit_products();
    wgmma::wait_products<0>();
    wgmma::hold(scores);
    free_tiles();
  }

  template <int kTile>
  __device__ __forceinline__ void add_scores(float (&scores)[kScoreTiles][4]) {
    const uint64_t queries = wgmma::describe(shared_address(shared_.queries[group_].bytes));
    const uint64_t keys = shared_.tiles.slot(turn_ + kTile).describe_keys();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      constexpr int kPanelSteps = wgmma::kPanelColumns / 16;
      const int within = step % kPanelSteps * wgmma::kStepBytes<wgmma::Rows::kAlongSum>;
      wgmma::add_shared_64<T, kTile * kKeys / 8>(scores,
                                                 queries + ((step / kPanelSteps * Queries::kPanelBytes + within) >> 4),
                                                 keys + ((step / kPanelSteps * Tile::kPanelBytes + within) >> 4));
    }
  }

  __device__ __forceinline__ void weigh(int first, float (&scores)[kScoreTiles][4],
                                        uint32_t (&weights)[kWeightSteps][4], SoftmaxState& state) {
    if (first + kStreamStepKeys > fewest_keys_) mask(first, scores);
    float factor[2];  // of what came before, which is nothing
    softmax_tile(scores, state, factor, params_.log2_scale, num_halves_);
#pragma unroll
    for (int j = 0; j < kWeightSteps; ++j) pack_probabilities<T>(weights[j], scores[2 * j], scores[2 * j + 1]);
  }

  __device__ __forceinline__ void mask(int first, float (&scores)[kScoreTiles][4]) {
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
      const int key = first + 8 * j + 2 * (lane_ % 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key + i % 2 >= limit_[i / 2]) scores[j][i] = minus_infinity();
      }
    }
  }

  __device__ __forceinline__ void multiply_values(int first, uint32_t (&weights)[kWeightSteps][4],
                                                  float (&sums)[kSumTiles][4]) {
    wait_tiles();
    if (first + kStreamStepKeys > step().row.kv_len) clear_values_from(step().row.kv_len - first);
    wgmma::hold(weights);
    wgmma::begin_products();
    add_values<0>(weights, sums);
    add_values<1>(weights, sums);
    wgmma::commit_products();
    wgmma::wait_products<0>();
    wgmma::hold(sums);
    free_tiles();
  }

  template <int kTile>
  __device__ __forceinline__ void add_values(const uint32_t (&weights)[kWeightSteps][4], float (&sums)[kSumTiles][4]) {
    const uint64_t values = shared_.tiles.slot(turn_ + kTile).describe_values();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      wgmma::multiply_across<T>(sums, weights[kTile * kKeys / 16 + step], values + (step * Tile::kStepBytes >> 4),
                                true);
    }
  }

  // The keys or the values of a step.
  __device__ __forceinline__ void wait_tiles() {
#pragma unroll
    for (unsigned tile = 0; tile < kStepTiles; ++tile) shared_.tiles.wait_full(turn_ + tile);
  }
  __device__ __forceinline__ void free_tiles() {
#pragma unroll
    for (unsigned tile = 0; tile < kStepTiles; ++tile) {
      if (lane_ == 0) shared_.tiles.arrive_free(turn_ + tile);
    }
    turn_ += kStepTiles;
  }

  // Slots of the row's last cache block beyond its last key may hold anything, and a weight of zero does not cure NaN.
  __device__ void clear_values_from(int first) const {
    constexpr int kPieces = kDim / 8;
    const int end = (first + box_keys_ - 1) / box_keys_ * box_keys_;
    const uint32_t tile = shared_address(shared_.tiles.slot(turn_ + first / kKeys).bytes);
    for (int i = group_ * kGroupThreads + thread_; i < (end - first) * kPieces; i += kGroups * kGroupThreads) {
      const uint32_t piece = tile + Tile::offset(first % kKeys + i / kPieces, i % kPieces * 8);
#pragma unroll
      for (uint32_t word = 0; word < 4; ++word) store_word(piece + 4 * word, 0);
    }
    wgmma::publish_operands();
    meet_lane();
  }

  // The tree ----------------------------------------------------------------------------------------------------------

  __device__ void fold(RowSums& sums, int position, int index) {
    finish_sums(sums.state);
    const int in_span = position % kSpanSteps;
    if (index - in_span < piece_.begin) {  // the span's beginning is another block's
      return write_partial(step_place(piece_.list, piece_.index, index), sums);
    }
    if (in_span == 0) span_ = RowSums{};
    for_halves([&](int half) { span_.append(sums, half, params_.log2_scale); });
    if (ends_span(position)) {
      close_span(position, position == step().all.count - 1);
    } else if (index == piece_.end - 1) {
      write_partial(step().all.place + position / kSpanSteps, span_);
    }
  }

  __device__ bool ends_span(int position) const {
    return position % kSpanSteps == kSpanSteps - 1 || position == step().all.count - 1;
  }

  __device__ void close_span(int position, bool is_last) {
    const bool is_first = position < kSpanSteps;
    if (piece_.takes_turns()) wait_turn(num_spans_ + position / kSpanSteps);
    if (is_first && is_last) return write_output(span_);
    if (!piece_.list.has_whole_rows()) return write_partial(step().all.place + position / kSpanSteps, span_);
    if (!is_first) for_halves([&](int half) { span_.prepend_kept(chain_of(half), half, params_.log2_scale); });
    if (is_last) return write_output(span_);
    for_halves([&](int half) { span_.keep(chain_of(half), half); });
  }

  __device__ int channel_of(int tile) const { return 8 * tile + 2 * (lane_ % 4); }

  __device__ void write_partial(int64_t place, const RowSums& sums) const {
    const Partial partial = partial_of(params_, place);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = packed_row(half);
      if (row >= step().num_packed) continue;
#pragma unroll
      for (int j = 0; j < kSumTiles; ++j) {
        *reinterpret_cast<float2*>(partial.sums + row * kDim + channel_of(j)) =
            make_float2(sums.values[j][2 * half], sums.values[j][2 * half + 1]);
      }
      if (lane_ % 4 != 0) continue;
      partial.largest[row] = sums.state.largest[half];
      partial.totals[row] = sums.state.sum[half];
    }
  }

  // Until the piece's spans before this one are over. The other lane does not come by again before this one has.
  __device__ void wait_turn(int span) const {
    if (span > 0) Barrier{shared_address(&shared_.turn)}.wait((span - 1) / 2 % 2);
  }

  // Of the rows in this half, while the piece holds them whole.
  __device__ float2* chain_of(int half) const {
    const int chain_idx = piece_.takes_turns() ? 0 : warpgroup_;
    float2* chain = chain_idx < num_chains_
                        ? shared_chain(piece_, params_) + chain_idx * chain_octets_ * kOctetWords
                        : workspace_chain(params_, piece_) + group_ * (kStreamRows / kOctetRows) * kOctetWords;
    return chain + packed_row(half) % kStreamRows / kOctetRows * kOctetWords + lane_;
  }

  __device__ void write_output(const RowSums& sums) const {
    const int64_t stride = static_cast<int64_t>(params_.attention.num_heads) * kDim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = packed_row(half);
      if (row >= step().num_packed) continue;
      const float factor = reciprocal_of(sums.state.sum[half]);
      T* target = static_cast<T*>(params_.attention.out) + fragment_offset(params_, step(), row, stride);
#pragma unroll
      for (int j = 0; j < kSumTiles; ++j) {
        *reinterpret_cast<uint32_t*>(target + channel_of(j)) =
            pack_pair<T>(__fmul_rn(sums.values[j][2 * half], factor), __fmul_rn(sums.values[j][2 * half + 1], factor));
      }
    }
  }

  const DecodeParams& params_;
  int box_keys_;
  int num_chains_;
  int chain_octets_;
  stream::Lane<kDim, kGroups>& shared_;
  Barrier next_turn_;
  const Piece& piece_;
  int warpgroup_;
  int group_;  // of the lane
  int thread_;
  int lane_;
  int num_halves_;  // of the warp's rows
  unsigned turn_ = 0;
  int num_spans_ = 0;  // of the piece, before the row's
  int limit_[2];     // keys that the lane's rows see
  int fewest_keys_;  // that any row of the warp sees
  RowSums span_;  // so far
};

#endif

}  // namespace headway::cuda::stream
