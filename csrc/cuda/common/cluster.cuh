// What the blocks of one cluster do together.
//
// A team: the blocks of one thread block cluster, or a single block where the device has no clusters (before sm_90).
// Reductions over all its threads, in an order fixed by the team's shape.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "cuda/common/reduce.cuh"

namespace headway::cuda {

inline constexpr int kMaxTeamBlocks = 8;
inline constexpr int kMaxTeamWarps = 32;
inline constexpr int kTeamSlotBytes = 16;

// In shared memory of every block of a team.
struct alignas(16) TeamMemory {
  unsigned char warps[kMaxTeamWarps][kTeamSlotBytes];
  unsigned char published[2][kTeamSlotBytes];  // two, so that one exchange needs one barrier
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// A cluster's barrier in two halves, neither of which orders memory but for barriers' inits published before.
__device__ __forceinline__ void arrive_in_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Stores a word at `target`'s place in another block's shared memory, which that block's barrier at `barrier` counts as
// bytes landed.
__device__ __forceinline__ void store_remote(uint32_t target, uint32_t word, uint32_t barrier, int rank) {
  asm volatile(
      "{ .reg .b32 there, counter; mapa.shared::cluster.u32 there, %0, %3; mapa.shared::cluster.u32 counter, %2, %3;\n"
      "  st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [counter]; }" ::"r"(target),
      "r"(word), "r"(barrier), "r"(rank)
      : "memory");
}
#endif

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int offset) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= kTeamSlotBytes);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (auto& word : words) word = __shfl_xor_sync(kFullWarp, word, offset);
  memcpy(&value, words, sizeof(T));
  return value;
}

class Team {
 public:
  __device__ explicit Team(TeamMemory& memory) : memory_(memory) {}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __device__ int rank() const { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
  __device__ int size() const { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
  __device__ void sync() const { cooperative_groups::this_cluster().sync(); }
  // The same variable in another block of the team.
  template <typename T>
  __device__ const T* peer(const T* local, int rank) const {
    return cooperative_groups::this_cluster().map_shared_rank(const_cast<T*>(local), rank);
  }
#else
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ void sync() const { __syncthreads(); }
  template <typename T>
  __device__ const T* peer(const T* local, int) const {
    return local;
  }
#endif

  // Combines one value a thread over this block; every thread gets it. Warp results stay readable through warp_value
  // until the next call.
  template <typename T, typename Op>
  __device__ T combine_block(T value, Op op) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value = op(value, shuffle_xor(value, offset));
    __syncthreads();  // the last call's values have been read
    if (threadIdx.x % kWarpSize == 0) memcpy(memory_.warps[warp], &value, sizeof(T));
    __syncthreads();
    T result = warp_value<T>(0);
    for (int i = 1; i < num_warps; ++i) result = op(result, warp_value<T>(i));
    return result;
  }

  template <typename T>
  __device__ T warp_value(int warp) const {
    T value;
    memcpy(&value, memory_.warps[warp], sizeof(T));
    return value;
  }

  // Shows `value` (thread 0's) to the team; afterwards published_value reads any block's, until the call after the
  // next.
  template <typename T>
  __device__ void publish(const T& value) {
    turn_ ^= 1;
    if (threadIdx.x == 0) memcpy(memory_.published[turn_], &value, sizeof(T));
    sync();
  }

  template <typename T>
  __device__ T published_value(int rank) const {
    T value;
    memcpy(&value, peer(&memory_.published[turn_][0], rank), sizeof(T));
    return value;
  }

  // Combines one value a thread over the team; every thread gets it.
  template <typename T, typename Op>
  __device__ T combine(T value, Op op) {
    publish(combine_block(value, op));
    T result = published_value<T>(0);
    for (int i = 1; i < size(); ++i) result = op(result, published_value<T>(i));
    return result;
  }

 private:
  TeamMemory& memory_;
  int turn_ = 0;
};

}  // namespace headway::cuda
