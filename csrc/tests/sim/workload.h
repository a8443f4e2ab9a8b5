// Random sizes and random requests: tiny pools, odd block sizes, every kind of model.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/types.h"
#include "tests/sim/rng.h"

namespace headway::sim {

struct RequestSpec {
  std::vector<int32_t> prompt;
  SamplingSpec sampling;
  int32_t max_new_tokens = 1;
  int32_t priority = 0;
  bool uses_cache = true;
};

LedgerConfig random_config(Rng& rng);
// May be too large for the config; `number` makes its seed, and so its stream, its own.
RequestSpec random_request(Rng& rng, const LedgerConfig& config, uint64_t number);
// Its prompt begins, at times, as those tokens do.
void begin_like(Rng& rng, const LedgerConfig& config, std::span<const int32_t> tokens, RequestSpec& request);
// One parameter out of range: add() must refuse it.
RequestSpec invalid_request(Rng& rng, const LedgerConfig& config);
// The same kind of model and the same limits, serial, with memory for num_requests at once and no prefix cache.
LedgerConfig ample_config(const LedgerConfig& config, int32_t num_requests);

}  // namespace headway::sim
