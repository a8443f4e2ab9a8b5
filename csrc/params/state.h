#pragma once

#include "core/step_layout.h"
#include "params/common.h"

namespace headway {

// Memory that holds a part of every state, in every layer: [num_layers, num_slots, slot_bytes] bytes.
struct StatePool {
  void* data;
  int64_t layer_bytes;  // from one layer to the next
  int64_t slot_bytes;   // of one slot of one layer, contiguous; slots follow each other
};

inline constexpr int kMaxStatePools = 4;

// Whole states from slot to slot, in all layers, before a step's layers run. No slot is the target of one copy and
// named by another; a copy onto itself does nothing.
struct CopyStatesParams {
  int32_t num_copies;
  const StateCopy* copies;  // [num_copies] memory of the device
  int32_t num_layers;
  int32_t num_pools;  // at most kMaxStatePools
  StatePool pools[kMaxStatePools];
};

}  // namespace headway
