// Types every kernel family shares. A kernel sees raw pointers, sizes, strides in elements, and a stream; never a
// tensor.
#pragma once

#include <cstdint>

namespace headway {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// cudaStream_t on a GPU; unused by the CPU kernels, which finish before they return.
using Stream = void*;

// The rows of a step, as every op over ragged rows takes them.
struct RowList {
  int32_t num_rows;            // R
  const int32_t* query_start;  // [R + 1] prefix sums of the rows' tokens
  const int32_t* row_start;    // [R] absolute position of the row's first token; 0 = nothing came before
};

}  // namespace headway
