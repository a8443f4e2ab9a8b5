// Turns CUDA's return codes and unsupported shapes into exceptions that name the op.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace headway::cuda {

inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
  }
}

// After each launch: reports what the launch itself refused (grid, shared memory, no kernel image for this device).
inline void check_launch(const char* op) {
  check(cudaGetLastError(), op);
}

inline void require(bool is_supported, const char* op, const std::string& limit) {
  if (!is_supported) throw std::runtime_error(std::string(op) + ": " + limit);
}

}  // namespace headway::cuda
