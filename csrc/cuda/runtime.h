// The little of the CUDA runtime that the host side needs besides kernels. Works where there is no driver: queries then
// answer 0, allocations throw.
#pragma once

#include <cstdint>

#include "params/common.h"

namespace headway::cuda {

// Usable devices; 0 without a driver.
int device_count();

// CUDA version the driver supports, such as 13000; 0 without a driver.
int driver_version();

// Page-locked host memory, zeroed, that every device reads and writes at the same address. Throws std::runtime_error.
void* pinned_alloc(int64_t num_bytes);
void pinned_free(void* memory);

// Puts an instantiated graph (a cudaGraphExec_t) on a stream of its device, behind a copy of news_bytes from
// page-locked memory where there are any. Nothing is waited for. Throws std::runtime_error.
void launch_graph(void* graph, Stream stream, int device_idx, void* inbox, const void* news, int64_t news_bytes);

}  // namespace headway::cuda
