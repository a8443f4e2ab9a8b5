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

inline constexpr int kPortableClusterBlocks = 8;  // every device with clusters has these

// Clusters of so many blocks that the device runs at once: fewer than its multiprocessors have room for, as a cluster
// stays within a part of the chip. 0: none of that size. cluster_blocks: up to kPortableClusterBlocks.
template <typename... Params>
int max_active_clusters(void (*kernel)(Params...), int cluster_blocks, int num_threads, const char* op) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster_blocks));
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.attrs = &attribute;
  config.numAttrs = 1;
  int num_clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&num_clusters, kernel, &config), op);
  return num_clusters;
}

}  // namespace headway::cuda
