// Small-batch products with the experts' weights, the weights streamed once. A block owns a tile of weight rows; its
// warps split the columns, 32 at a time, so that a sum's order depends on the matrix's shape alone. Each lane copies
// through its own queue in shared memory exactly the 16-byte pieces its product needs: no lane ever waits for another
// one's copy, and copying runs ahead across experts.
//
// A piece is 8 neighbouring columns. m16n8k16 wants columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of lane t; giving both
// operands columns 8 t .. 8 t + 3 instead permutes the columns of the sum, which is free.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/reduce.cuh"
#include "params/moe.h"

namespace headway::cuda {

inline constexpr int kMoeWarps = 8;
inline constexpr int kMoeThreads = kMoeWarps * 32;
inline constexpr int kMoeChunk = 32;              // columns of a warp's step
inline constexpr int kMoePieceBytes = 512;        // 16 bytes a lane
inline constexpr int kMoeHalfQueueBytes = 10 * 1024;  // a warp's, where two blocks are to fit a multiprocessor
inline constexpr int kMoeWholeQueueBytes = 24 * 1024;  // where one block has it to itself
inline constexpr int kMaxMoeExperts = 1024;

// The step's (token, expert) pairs by expert.
struct PairTable {
  int32_t* first;     // [E + 1] into pairs
  int32_t* cursor;    // [E]
  uint16_t* touched;  // [E] experts with pairs, ascending
  uint16_t* pairs;    // [T K] token * K + place
  int32_t* num_touched;

  __host__ __device__ static int64_t bytes(int num_experts, int64_t num_pairs) {
    return (2 * num_experts + 2) * 4 + (num_experts + num_pairs) * 2 + 16;
  }

  __device__ PairTable(unsigned char* base, int num_experts)
      : first(reinterpret_cast<int32_t*>(base)),
        cursor(first + num_experts + 1),
        touched(reinterpret_cast<uint16_t*>(cursor + num_experts + 1)),
        pairs(touched + num_experts),
        num_touched(cursor + num_experts) {}

  __device__ int count(int expert) const { return first[expert + 1] - first[expert]; }
};

// Counting sort. The order of an expert's pairs is not fixed; no result depends on it.
__device__ inline void build_pairs(const PairTable& table, const int32_t* expert_ids, int num_pairs, int num_experts) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int e = thread; e < num_experts; e += kMoeThreads) table.cursor[e] = 0;
  __syncthreads();
  for (int i = thread; i < num_pairs; i += kMoeThreads) atomicAdd(&table.cursor[expert_ids[i]], 1);
  __syncthreads();
  if (thread < kWarpSize) {
    int before = 0;
    int num_touched = 0;
    for (int base = 0; base < num_experts; base += kWarpSize) {
      const int e = base + thread;
      const int count = e < num_experts ? table.cursor[e] : 0;
      int inclusive = count;
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int other = __shfl_up_sync(kFullWarp, inclusive, offset);
        if (thread >= offset) inclusive += other;
      }
      const uint32_t used = __ballot_sync(kFullWarp, count > 0);
      if (e < num_experts) table.first[e] = before + inclusive - count;
      if (count > 0) table.touched[num_touched + __popc(used & ((1u << thread) - 1))] = static_cast<uint16_t>(e);
      before += __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
      num_touched += __popc(used);
    }
    if (thread == 0) {
      table.first[num_experts] = before;
      *table.num_touched = num_touched;
    }
  }
  __syncthreads();
  for (int e = thread; e < num_experts; e += kMoeThreads) table.cursor[e] = table.first[e];
  __syncthreads();
  for (int i = thread; i < num_pairs; i += kMoeThreads) {
    table.pairs[atomicAdd(&table.cursor[expert_ids[i]], 1)] = static_cast<uint16_t>(i);
  }
  __syncthreads();
}

// One product with the experts' matrices [E, rows, columns], as one block sees it.
struct ExpertProduct {
  const void* weights;
  int64_t rows;  // of a matrix
  int columns;
  int fragment_row[2];  // first row of each 16-row fragment of the block
  int row_limit[2];     // first row beyond the fragment's part of the matrix
  const void* inputs;   // row of a pair: (pair / inputs_divisor) * input_stride
  int input_divisor;
  int64_t input_stride;
};

// A place in the block's work: 8 kTokenTiles pairs of one expert.
struct MoeItem {
  int rank;   // into touched
  int first;  // pair of the expert
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
  __device__ ExpertStream(const ExpertProduct& product, const PairTable& table, MoeItem first, int rank_step,
                          unsigned char* queue, int warp, int lane)
      : product_(product),
        table_(table),
        first_(first),
        rank_step_(rank_step),
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
    item_ = first_;
    if (warp_ >= num_chunks_) item_.rank = *table_.num_touched;  // more warps than chunks: nothing to copy
    chunk_ = warp_;
    stage_ = 0;
    find_sources();
  }

  __device__ void advance() {
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
    chunk_ += kMoeWarps;
    if (is_over_ || chunk_ < num_chunks_) return;
    chunk_ = warp_;
    item_.first += kItemPairs;
    if (item_.first >= table_.count(table_.touched[item_.rank])) item_ = {item_.rank + rank_step_, 0};
    find_sources();
  }

  // Where this lane's pieces of the item begin; what is not there gets a valid address and no bit.
  __device__ void find_sources() {
    is_over_ = item_.rank >= *table_.num_touched;
    if (is_over_) return;
    const int expert = table_.touched[item_.rank];
    const int num_pairs = table_.count(expert);
    const uint16_t* pairs = table_.pairs + table_.first[expert];
    valid_ = 0;
#pragma unroll
    for (int i = 0; i < 2 * kFragments; ++i) {
      const int row = product_.fragment_row[i / 2] + i % 2 * 8 + lane_ / 4;
      const bool is_valid = row < product_.row_limit[i / 2];
      valid_ |= is_valid ? 1u << i : 0;
      weights_[i] = static_cast<const T*>(product_.weights) +
                    (expert * product_.rows + (is_valid ? row : 0)) * product_.columns + lane_ % 4 * 8;
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int place = item_.first + 8 * n + lane_ / 4;
      const bool is_valid = place < num_pairs;
      valid_ |= is_valid ? 1u << (2 * kFragments + n) : 0;
      const int row = is_valid ? pairs[place] / product_.input_divisor : 0;
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
  MoeItem first_;
  int rank_step_;
  int num_chunks_;
  int warp_;
  int lane_;
  unsigned char* queue_;  // of this lane
  MoeItem item_;          // to copy, as the following
  int chunk_;
  int stage_;
  bool is_over_;
  uint32_t valid_;  // bit i: piece i is there
  const T* weights_[2 * kFragments];
  const T* inputs_[kTokenTiles];
  int used_ = 0;          // stage the next product uses
};

}  // namespace headway::cuda
