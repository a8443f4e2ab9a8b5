// Moves records between pools of which one may lie in pinned host memory, which the kernel reads and writes over the
// bus: thousands of blocks in one launch, where each would be a copy of its own. How many thread blocks share the work
// is the caller's choice: stores that come faster than the bus takes them hold up what else the memory system does.
#include <algorithm>

#include "cuda/common/check.h"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "move_records";
constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // words of a thread on their way at once

template <typename Word>
__device__ __forceinline__ void move_piece(const uint8_t* source, uint8_t* target, int64_t num_bytes) {
  const auto* words = reinterpret_cast<const Word*>(source);
  auto* moved = reinterpret_cast<Word*>(target);
  const auto num_words = static_cast<int>(num_bytes / static_cast<int64_t>(sizeof(Word)));
  for (int first = static_cast<int>(threadIdx.x); first < num_words; first += kThreads * kUnroll) {
    Word held[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * kThreads < num_words) held[i] = words[first + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * kThreads < num_words) moved[first + i * kThreads] = held[i];
    }
  }
}

// The last pool that begins at the piece or before.
__device__ __forceinline__ int find_pool(const RecordPool* pools, int num_pools, int64_t piece) {
  int low = 0;
  for (int high = num_pools - 1; low < high;) {
    const int middle = (low + high + 1) / 2;
    if (pools[middle].first_piece <= piece) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kThreads) move_records_kernel(MoveRecordsParams params) {
  // Thread block -> pieces of records, gridDim.x apart.
  const int64_t num_items = params.num_pieces * params.num_moves;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t piece = item % params.num_pieces;
    const RecordMove move = params.moves[item / params.num_pieces];
    const RecordPool pool = params.pools[find_pool(params.pools, params.num_pools, piece)];
    const int64_t begin = (piece - pool.first_piece) * kPieceBytes;
    const int64_t left = pool.record_bytes - begin;
    const int64_t num_bytes = left < kPieceBytes ? left : kPieceBytes;
    const uint8_t* source = pool.source + move.source * pool.source_stride + begin;
    uint8_t* target = pool.target + move.target * pool.target_stride + begin;
    const auto bits =
        reinterpret_cast<uintptr_t>(source) | reinterpret_cast<uintptr_t>(target) | static_cast<uintptr_t>(num_bytes);
    if (bits % sizeof(uint4) == 0) {
      move_piece<uint4>(source, target, num_bytes);
    } else if (bits % sizeof(uint32_t) == 0) {
      move_piece<uint32_t>(source, target, num_bytes);
    } else {
      move_piece<uint8_t>(source, target, num_bytes);
    }
  }
}

}  // namespace

void move_records(const MoveRecordsParams& params, Stream stream) {
  const int64_t num_items = params.num_pieces * params.num_moves;
  if (num_items == 0) return;
  const auto num_blocks = static_cast<unsigned>(std::min<int64_t>(num_items, params.max_thread_blocks));
  move_records_kernel<<<num_blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  check_launch(kOp);
}

}  // namespace headway::cuda
