// Moves records between pools. No arithmetic, so one build serves every SIMD level; on the calling thread alone, since
// it is called beside the steps and memory bounds it.
#include <cstring>

#include "cpu/ops.h"

namespace headway::cpu {

void move_records(const MoveRecordsParams& params, Stream) {
  for (int32_t i = 0; i < params.num_pools; ++i) {
    const RecordPool& pool = params.pools[i];
    for (int32_t k = 0; k < params.num_moves; ++k) {
      std::memcpy(pool.target + params.moves[k].target * pool.target_stride,
                  pool.source + params.moves[k].source * pool.source_stride, static_cast<size_t>(pool.record_bytes));
    }
  }
}

}  // namespace headway::cpu
