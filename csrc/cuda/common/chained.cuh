// Programmatic dependent launch, from sm_90 on: a kernel that starts while the one before it in the stream still runs,
// and waits for it on the device. Elsewhere an ordinary launch. CUDA programming guide, "Programmatic Dependent
// Launch".
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "cuda/common/check.h"
#include "cuda/common/device.h"

namespace headway::cuda {

// Whether the code that the device runs was compiled for at least this architecture (90 = sm_90): newer devices may run
// code compiled for older ones.
template <typename... Params>
bool is_compiled_for(void (*kernel)(Params...), int architecture, const char* op) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), op);
  return attributes.ptxVersion >= architecture;
}

// A later chained kernel may start once every block has called this or left.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Every thread of a chained kernel calls this before it reads what the previous kernel wrote, and before it leaves:
// whoever comes after the chained kernel relies on both being over.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// How a chained kernel begins: one thread prepares what owes nothing to the previous kernel.
template <typename Prepare>
__device__ __forceinline__ void begin_chained_kernel(Prepare&& prepare) {
  allow_next_kernel();
  if (threadIdx.x == 0) prepare();
  __syncthreads();
  wait_for_previous_kernel();
}

// shared_bytes: dynamic shared memory, up to what the device has for a block. cluster_blocks: of a cluster, along x, up
// to kPortableClusterBlocks.
template <typename... Params, typename... Args>
void launch_chained_clusters(const char* op, void (*kernel)(Params...), dim3 grid, int cluster_blocks, dim3 block,
                             int shared_bytes, cudaStream_t stream, Args&&... args) {
  if (shared_bytes > 0) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), op);
  }
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !is_compiled_for(kernel, 90, op) ? 0 : cluster_blocks > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), op);
}

template <typename... Params, typename... Args>
void launch_chained_wide(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, int shared_bytes,
                         cudaStream_t stream, Args&&... args) {
  launch_chained_clusters(op, kernel, grid, 1, block, shared_bytes, stream, std::forward<Args>(args)...);
}

template <typename... Params, typename... Args>
void launch_chained(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                    Args&&... args) {
  launch_chained_wide(op, kernel, grid, block, 0, stream, std::forward<Args>(args)...);
}

}  // namespace headway::cuda
