// The little of the CUDA runtime that the host side needs besides kernels. Works where there is no driver: queries then
// answer 0, allocations throw.
#pragma once

#include <cstdint>

namespace headway::cuda {

// Usable devices; 0 without a driver.
int device_count();

// CUDA version the driver supports, such as 13000; 0 without a driver.
int driver_version();

// Page-locked host memory, zeroed, that every device reads and writes at the same address. Throws std::runtime_error.
void* pinned_alloc(int64_t num_bytes);
void pinned_free(void* memory);

}  // namespace headway::cuda
