// Barriers in shared memory that count arrivals and, from sm_90 on, the bytes of bulk copies; and those copies.
// PTX ISA, "mbarrier" and "cp.async.bulk".
#pragma once

#include <cstdint>

namespace headway::cuda {

// One barrier; its phases alternate between parity 0 and 1. Threads share it by its shared-memory address.
struct Barrier {
  uint32_t address;

  // One thread, before any other use.
  __device__ __forceinline__ void init(int num_arrivals) const {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(num_arrivals) : "memory");
  }

  __device__ __forceinline__ void arrive() const {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(address) : "memory");
  }

  // Arrives when all asynchronous copies of this thread so far have landed.
  __device__ __forceinline__ void arrive_after_copies() const {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address) : "memory");
  }

  // Waits for the end of the phase of this parity.
  __device__ __forceinline__ void wait(uint32_t parity) const {
    uint32_t is_done = 0;
    while (is_done == 0) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      asm volatile(
          "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
          : "=r"(is_done)
          : "r"(address), "r"(parity)
          : "memory");
#else
      asm volatile("{ .reg .pred done; mbarrier.test_wait.parity.shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
                   : "=r"(is_done)
                   : "r"(address), "r"(parity)
                   : "memory");
#endif
    }
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // Arrives, and makes the phase wait for this many bytes of bulk copies.
  __device__ __forceinline__ void arrive_expecting(uint32_t num_bytes) const {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(address),
                 "r"(num_bytes)
                 : "memory");
  }
#endif
};

// Makes initialised barriers visible to the copy engine; a block-wide barrier must follow.
__device__ __forceinline__ void fence_barrier_init() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine or of wgmma.
__device__ __forceinline__ void fence_async_proxy() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// One thread copies num_bytes (a multiple of 16, as are both addresses) and counts them on the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t target, const void* source, uint32_t num_bytes, Barrier barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(num_bytes), "r"(barrier.address)
               : "memory");
}
#endif

}  // namespace headway::cuda
