// Finding a token's row among ragged rows.
#pragma once

#include <cstdint>

#include "cuda/common/reduce.cuh"

namespace headway::cuda {

// Index of the row that holds flat token `token` (0 <= token < query_start[num_rows]): the only row whose end lies
// beyond it and whose start does not. All 32 lanes call it; each step narrows the range 32 times, so two dependent
// loads serve 1,024 rows.
__device__ __forceinline__ int find_row(const int32_t* query_start, int num_rows, int token) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int first = 0;
  int count = num_rows;
  while (count > 1) {
    const int step = (count + kWarpSize - 1) / kWarpSize;
    const int probe = first + lane * step;
    const bool has_begun = lane * step < count && query_start[probe] <= token;
    // Starts are sorted, so the lanes that have begun are a prefix; lane 0 always is one.
    const int chosen = __popc(__ballot_sync(kFullWarp, has_begun)) - 1;
    first += chosen * step;
    count = min(step, count - chosen * step);
  }
  return first;
}

}  // namespace headway::cuda
