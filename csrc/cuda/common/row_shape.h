// How many threads hold one row of a tensor in registers, for kernels that give a block to each row and read it once.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/check.h"

namespace headway::cuda {

inline constexpr int kMaxRowThreads = 1024;
inline constexpr int kWideRowThreads = 512;
inline constexpr int kMaxThreadElements = 64;
inline constexpr int kMaxRowElements = kWideRowThreads * kMaxThreadElements;

// Threads a block at most for a kernel whose threads hold `items` pieces of `width` elements: 64 fp32 values a thread
// do not fit the registers of 1,024 threads.
constexpr int max_row_threads(int items, int width) {
  return items * width == kMaxThreadElements ? kWideRowThreads : kMaxRowThreads;
}

// Calls body(std::integral_constant<int, items>, threads): the fewest pieces of kWidth elements a thread that cover
// `num_elements`, and the block size, a multiple of 32. Depends on num_elements alone.
template <int kWidth, typename Body>
void dispatch_row_shape(int64_t num_elements, const char* op, Body&& body) {
  const int64_t num_pieces = num_elements / kWidth;
  const auto launch = [&](auto items) {
    const int64_t wanted = (num_pieces + items - 1) / items;
    body(items, static_cast<int>((wanted + 31) / 32 * 32));
  };
  if (num_pieces <= kMaxRowThreads) return launch(std::integral_constant<int, 1>{});
  if (num_pieces <= 2 * kMaxRowThreads) return launch(std::integral_constant<int, 2>{});
  require(num_elements <= kMaxRowElements, op, "a row (hidden, or group_size) has more than 32768 elements");
  launch(std::integral_constant<int, kMaxThreadElements / kWidth>{});
}

}  // namespace headway::cuda
