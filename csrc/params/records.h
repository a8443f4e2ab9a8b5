#pragma once

#include "core/step_layout.h"
#include "params/common.h"

namespace headway {

// Two places that keep records of one size, by index: one layer's keys on the device and in host memory.
struct RecordPool {
  const uint8_t* source;
  uint8_t* target;
  int64_t source_stride;  // bytes from one record to the next
  int64_t target_stride;
  int64_t record_bytes;
  int64_t first_piece;  // pieces of kPieceBytes that a record of all pools before takes
};
static_assert(sizeof(RecordPool) == 48, "RecordPool is written raw by the host");

inline constexpr int64_t kPieceBytes = 16384;  // the last of a record may be shorter

// Records from place to place, in every pool. Sources and targets do not overlap. All pointers are of memory that the
// device reads, or writes: its own, or pinned memory of the host.
struct MoveRecordsParams {
  int32_t num_moves;
  const RecordMove* moves;  // [num_moves]
  int32_t num_pools;
  const RecordPool* pools;  // [num_pools]
  int64_t num_pieces;  // of one record in all pools
  int32_t max_thread_blocks;  // that a GPU gives to it, >= 1: few leave the bus and memory to what runs beside it
};

}  // namespace headway
