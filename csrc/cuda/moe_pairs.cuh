// A step's (token, expert) pairs by expert, as every block of the experts' kernels sorts them for itself in shared
// memory. Knows nothing of the products.
#pragma once

#include "cuda/common/reduce.cuh"
#include "params/moe.h"

namespace headway::cuda {

inline constexpr int kMaxMoeExperts = 1024;

// The pairs of an expert, or some of them.
struct ExpertPairs {
  uint16_t expert;
  uint16_t count;
  int32_t first;  // into PairTable::pairs

  // As many as are multiplied together, from `begin` on.
  __device__ __forceinline__ ExpertPairs chunk(int begin, int most) const {
    return {expert, static_cast<uint16_t>(min(most, count - begin)), first + begin};
  }
};

// The order of an expert's pairs is the block's own: whoever shares them out among blocks must share out rows instead.
struct PairTable {
  int32_t* cursor;  // [E] while sorting
  int32_t* num_touched;
  ExpertPairs* touched;  // experts with pairs, ascending
  uint16_t* pairs;  // [T K] token * K + place, by expert

  __host__ __device__ static int64_t most_touched(int num_experts, int64_t num_pairs) {
    return num_pairs < num_experts ? num_pairs : num_experts;
  }
  __host__ __device__ static int64_t bytes(int num_experts, int64_t num_pairs) {
    const int64_t touched_bytes = most_touched(num_experts, num_pairs) * static_cast<int64_t>(sizeof(ExpertPairs));
    return (num_experts / 2 * 2 + 2) * 4 + touched_bytes + num_pairs * 2;
  }

  // base: on 8 bytes.
  __device__ PairTable(unsigned char* base, int num_experts, int64_t num_pairs)
      : cursor(reinterpret_cast<int32_t*>(base)),
        num_touched(cursor + num_experts),
        touched(reinterpret_cast<ExpertPairs*>(cursor + num_experts / 2 * 2 + 2)),
        pairs(reinterpret_cast<uint16_t*>(touched + most_touched(num_experts, num_pairs))) {}
};

namespace pairs {

__device__ __forceinline__ int inclusive_sum(int value, int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kFullWarp, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}

// One warp, at most 32 pairs, a lane each: a pair's place is the number of those before it.
__device__ inline void sort_few(const PairTable& table, const int32_t* expert_ids, int num_pairs) {
  const auto lane = static_cast<int>(threadIdx.x);
  const int expert = lane < num_pairs ? expert_ids[lane] : INT32_MAX;
  const uint32_t mine = __match_any_sync(kFullWarp, expert);
  const int earlier = __popc(mine & ((1u << lane) - 1));
  const bool is_first = lane < num_pairs && earlier == 0;
  const uint32_t firsts = __ballot_sync(kFullWarp, is_first);
  int before = earlier;
  int touched_before = 0;
  for (int other = 0; other < num_pairs; ++other) {
    const bool is_lower = __shfl_sync(kFullWarp, expert, other) < expert;
    before += is_lower ? 1 : 0;
    touched_before += is_lower ? static_cast<int>(firsts >> other & 1u) : 0;
  }
  if (lane < num_pairs) table.pairs[before] = static_cast<uint16_t>(lane);
  if (is_first) {
    table.touched[touched_before] = {static_cast<uint16_t>(expert), static_cast<uint16_t>(__popc(mine)), before};
  }
  if (lane == 0) *table.num_touched = __popc(firsts);
}

// One warp: where each expert's pairs begin, from their counts in cursor.
__device__ inline void place_experts(const PairTable& table, int num_experts) {
  const auto lane = static_cast<int>(threadIdx.x);
  int before = 0;
  int touched_before = 0;
  for (int base = 0; base < num_experts; base += kWarpSize) {
    const int expert = base + lane;
    const int count = expert < num_experts ? table.cursor[expert] : 0;
    const int up_to = inclusive_sum(count, lane);
    const int first = before + up_to - count;
    const uint32_t used = __ballot_sync(kFullWarp, count > 0);
    if (expert < num_experts) table.cursor[expert] = first;
    if (count > 0) {
      const int rank = touched_before + __popc(used & ((1u << lane) - 1));
      table.touched[rank] = {static_cast<uint16_t>(expert), static_cast<uint16_t>(count), first};
    }
    before += __shfl_sync(kFullWarp, up_to, kWarpSize - 1);
    touched_before += __popc(used);
  }
  if (lane == 0) *table.num_touched = touched_before;
}

}  // namespace pairs

// Counting sort by all threads of the block, at least a warp.
__device__ inline void build_pairs(const PairTable& table, const int32_t* expert_ids, int num_pairs, int num_experts) {
  const auto thread = static_cast<int>(threadIdx.x);
  const auto num_threads = static_cast<int>(blockDim.x);
  if (num_pairs <= kWarpSize) {
    if (thread < kWarpSize) pairs::sort_few(table, expert_ids, num_pairs);
    __syncthreads();
    return;
  }
  for (int e = thread; e < num_experts; e += num_threads) table.cursor[e] = 0;
  __syncthreads();
#pragma unroll 4
  for (int i = thread; i < num_pairs; i += num_threads) atomicAdd(&table.cursor[expert_ids[i]], 1);
  __syncthreads();
  if (thread < kWarpSize) pairs::place_experts(table, num_experts);
  __syncthreads();
#pragma unroll 4
  for (int i = thread; i < num_pairs; i += num_threads) {
    table.pairs[atomicAdd(&table.cursor[expert_ids[i]], 1)] = static_cast<uint16_t>(i);
  }
  __syncthreads();
}

}  // namespace headway::cuda
