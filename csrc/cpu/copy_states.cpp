// Copies whole states between slots. No arithmetic, so one build serves every SIMD level.
#include <cstring>

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace headway::cpu {

void copy_states(const CopyStatesParams& params, Stream) {
  int64_t state_bytes = 0;
  for (int i = 0; i < params.num_pools; ++i) state_bytes += params.pools[i].slot_bytes * params.num_layers;
  const int64_t num_items = int64_t{params.num_copies} * params.num_layers * params.num_pools;
  parallel_for(num_items, params.num_copies * state_bytes / 4, [&](int64_t item) {
    const StateCopy& copy = params.copies[item / (params.num_layers * params.num_pools)];
    if (copy.src_slot == copy.dst_slot) return;
    const StatePool& pool = params.pools[item % params.num_pools];
    auto* layer = static_cast<uint8_t*>(pool.data) + item / params.num_pools % params.num_layers * pool.layer_bytes;
    std::memcpy(layer + copy.dst_slot * pool.slot_bytes, layer + copy.src_slot * pool.slot_bytes,
                static_cast<size_t>(pool.slot_bytes));
  });
}

}  // namespace headway::cpu
