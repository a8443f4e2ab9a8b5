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

}  // namespace headway::cuda
