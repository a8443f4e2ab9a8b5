// What the host asks about the current device.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/check.h"

namespace headway::cuda {

inline int device_attribute(cudaDeviceAttr attribute, const char* op) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), op);
  check(cudaDeviceGetAttribute(&value, attribute, device), op);
  return value;
}

// Blocks of this size that the current device holds at once; allows the kernel that much dynamic shared memory.
template <typename... Params>
int resident_blocks(void (*kernel)(Params...), int num_threads, int shared_bytes, const char* op) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), op);
  int per_multiprocessor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, num_threads,
                                                      static_cast<size_t>(shared_bytes)),
        op);
  return per_multiprocessor * device_attribute(cudaDevAttrMultiProcessorCount, op);
}

}  // namespace headway::cuda
