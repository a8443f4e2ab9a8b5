// Small-batch products with the experts' weights, the weights streamed once. A block owns a tile of weight rows; its
// warps split the columns, 32 at a time, so that a sum's order depends on the matrix's shape alone. Each lane copies
// through its own queue in shared memory exactly the 16-byte pieces its product needs: no lane ever waits for another
// one's copy, and copying runs ahead across experts.
//
// A piece is 8 neighbouring columns. m16n8k16 wants columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of lane t; giving both
// operands columns 8 t .. 8 t + 3 instead permutes the columns of the sum, which is free.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/moe_pairs.cuh"

namespace headway::cuda {

inline constexpr int kMoeWarps = 8;
inline constexpr int kMoeThreads = kMoeWarps * 32;
inline constexpr int kMoeChunk = 32;              // columns of a warp's step
inline constexpr int kMoePieceBytes = 512;        // 16 bytes a lane
inline constexpr int kMoeHalfQueueBytes = 10 * 1024;  // a warp's, where two blocks are to fit a multiprocessor
inline constexpr int kMoeWholeQueueBytes = 24 * 1024;  // where one block has it to itself

// One product with the experts' matrices [E, rows, columns]. Items of work are tiles of the touched experts: item i is
// tile i % num_tiles of touched expert i / num_tiles.
struct ExpertProduct {
  const void* weights;
  int64_t rows;  // of a matrix
  int columns;
  int num_tiles;
  int tile_rows;
  int row_limit;       // rows that tiles are made of
  int fragment_step;   // rows from the first one of a tile's 16-row fragment to that of the next
  int limit_step;      // by which the next fragment's row_limit is higher
  const void* inputs;  // row of a pair: (pair / input_divisor) * input_stride
  int input_divisor;
  int64_t input_stride;
};

// A place in a block's items, which are `step` apart: tile `tile` of touched expert `rank`.
struct MoeItem {
  int rank;
  int tile;

  __device__ __forceinline__ MoeItem(int idx, int num_tiles) : rank(idx / num_tiles), tile(idx % num_tiles) {}

  // step_ranks, step_tiles: of the step, as an item.
  __device__ __forceinline__ void advance(const MoeItem& step, int num_tiles) {
    rank += step.rank;
    tile += step.tile;
    if (tile < num_tiles) return;
    tile -= num_tiles;
    ++rank;
  }
};

// A block's items: first, first + step, ...
struct MoeItems {
  int first;
  int step;
};

template <typename T, int kFragments, int kTokenTiles, int kQueueBytes>
class ExpertStream {
 public:
  static constexpr int kItemPairs = 8 * kTokenTiles;
  static constexpr int kStagePieces = 2 * kFragments + kTokenTiles;
  static constexpr int kStageBytes = kStagePieces * kMoePieceBytes;
  static constexpr int kStages = kQueueBytes / kStageBytes;
  static_assert(kStages >= 3);

  // Starts the first copies of weights; start_inputs must follow.
  __device__ ExpertStream(const ExpertProduct& product, const PairTable& table, MoeItems items, unsigned char* queue,
                          int warp, int lane)
      : product_(product),
        table_(table),
        items_(items),
        num_touched_(*table.num_touched),
        step_(items.step, product.num_tiles),
        item_(items.first, product.num_tiles),
        num_chunks_((product.columns + kMoeChunk - 1) / kMoeChunk),
        warp_(warp),
        lane_(lane),
        queue_(queue + lane * 16) {
    restart();
    for (int i = 0; i < kStages - 1; ++i) {
      copy_weights();
      advance();
    }
  }

  // The first inputs may be read from now on.
  __device__ void start_inputs() {
    restart();
    for (int i = 0; i < kStages - 1; ++i) {
      copy_inputs();
      commit_copies();
      advance();
    }
  }

  // Adds this warp's part of the item's product. sums[f][n]: rows of fragment f, pairs 8 n .. of the item.
  __device__ void multiply(float (&sums)[kFragments][kTokenTiles][4]) {
    for (int chunk = warp_; chunk < num_chunks_; chunk += kMoeWarps) {
      wait_copies<kStages - 2>();
      const auto* stage = reinterpret_cast<const uint4*>(queue_ + used_ * kStageBytes);
      uint4 pieces[kStagePieces];
#pragma unroll
      for (int i = 0; i < kStagePieces; ++i) pieces[i] = stage[i * kMoePieceBytes / 16];
      used_ = used_ + 1 == kStages ? 0 : used_ + 1;
      // The stage written is the one whose pieces were last loaded, by this lane alone.
      copy_weights();
      copy_inputs();
      commit_copies();
      advance();
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const uint4 upper = pieces[2 * f];
        const uint4 lower = pieces[2 * f + 1];
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const uint4 input = pieces[2 * kFragments + n];
          multiply_add<T>(sums[f][n], first, input.x, input.y);
          multiply_add<T>(sums[f][n], second, input.z, input.w);
        }
      }
    }
  }

 private:
  __device__ void restart() {
    begin_ = 0;
    item_ = MoeItem(items_.first, product_.num_tiles);
    if (warp_ >= num_chunks_) item_.rank = num_touched_;  // more warps than chunks: nothing to copy
    chunk_ = warp_;
    stage_ = 0;
    find_sources();
  }

  __device__ void advance() {
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
    chunk_ += kMoeWarps;
    if (is_over_ || chunk_ < num_chunks_) return;
    chunk_ = warp_;
    begin_ += kItemPairs;
    if (begin_ >= num_pairs_) {
      begin_ = 0;
      item_.advance(step_, product_.num_tiles);
    }
    find_sources();
  }

  // Where this lane's pieces of the item begin; what is not there gets a valid address and no bit.
  __device__ void find_sources() {
    is_over_ = item_.rank >= num_touched_;
    if (is_over_) return;
    const ExpertPairs all = table_.touched[item_.rank];
    const ExpertPairs chunk = all.chunk(begin_, kItemPairs);
    num_pairs_ = all.count;
    const int first_row = item_.tile * product_.tile_rows;
    const int end_row = min(first_row + product_.tile_rows, product_.row_limit);
    valid_ = 0;
#pragma unroll
    for (int i = 0; i < 2 * kFragments; ++i) {
      const int row = first_row + i / 2 * product_.fragment_step + i % 2 * 8 + lane_ / 4;
      const bool is_valid = row < end_row + i / 2 * product_.limit_step;
      valid_ |= is_valid ? 1u << i : 0;
      weights_[i] = static_cast<const T*>(product_.weights) +
                    (chunk.expert * product_.rows + (is_valid ? row : 0)) * product_.columns + lane_ % 4 * 8;
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int place = 8 * n + lane_ / 4;
      const bool is_valid = place < chunk.count;
      valid_ |= is_valid ? 1u << (2 * kFragments + n) : 0;
      const int row = is_valid ? table_.pairs[chunk.first + place] / product_.input_divisor : 0;
      inputs_[n] = static_cast<const T*>(product_.inputs) + row * product_.input_stride + lane_ % 4 * 8;
    }
  }

  __device__ bool has_column() const { return chunk_ * kMoeChunk + lane_ % 4 * 8 < product_.columns; }

  __device__ void copy(int piece, const T* source) const {
    const bool is_valid = has_column() && (valid_ >> piece & 1) != 0;
    const int column = has_column() ? chunk_ * kMoeChunk : 0;
    copy_async(shared_address(queue_ + stage_ * kStageBytes + piece * kMoePieceBytes), source + column, is_valid);
  }

  __device__ void copy_weights() const {
    if (is_over_) return;
#pragma unroll
    for (int i = 0; i < 2 * kFragments; ++i) copy(i, weights_[i]);
  }

  __device__ void copy_inputs() const {
    if (is_over_) return;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) copy(2 * kFragments + n, inputs_[n]);
  }

  const ExpertProduct& product_;
  const PairTable& table_;
  MoeItems items_;
  int num_touched_;
  MoeItem step_;
  MoeItem item_;  // to copy, as the following
  int begin_ = 0;  // of its pairs
  int num_pairs_ = 0;
  int num_chunks_;
  int warp_;
  int lane_;
  unsigned char* queue_;  // of this lane
  int chunk_;
  int stage_;
  bool is_over_;
  uint32_t valid_;  // bit i: piece i is there
  const T* weights_[2 * kFragments];
  const T* inputs_[kTokenTiles];
  int used_ = 0;          // stage the next product uses
};

}  // namespace headway::cuda
