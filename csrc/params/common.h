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

// States to keep beside the rows' own: those that row r has after some of its tokens. At entries starts[r] up to
// starts[r + 1]: absolute positions in (row_start, row_start + tokens], ascending, and the slots that take the states.
// No such slot is read or written otherwise in the same call.
struct SnapshotList {
  const int32_t* starts = nullptr;  // [R + 1]; null: no row leaves any
  const int32_t* positions = nullptr;
  const int32_t* slots = nullptr;
};

}  // namespace headway
