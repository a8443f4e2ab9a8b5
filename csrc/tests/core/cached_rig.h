// A ledger with its prefix cache on, and prompts that begin alike, for checks.
#pragma once

#include <numeric>
#include <string_view>
#include <vector>

#include "tests/check.h"
#include "tests/core/fake_device.h"

namespace headway::checks {

inline LedgerConfig cached_config(int32_t num_blocks = 64, int32_t num_slots = 12, int32_t max_launch_depth = 0) {
  LedgerConfig config{.max_rows = 4,
                      .num_blocks = num_blocks,
                      .block_size = 4,
                      .num_slots = num_slots,
                      .max_model_len = 64,
                      .max_step_tokens = 64,
                      .vocab_size = 1000,
                      .max_logprobs = 0,
                      .max_launch_depth = max_launch_depth};
  config.use_prefix_cache = true;
  config.max_snapshots = num_slots;
  return config;
}

inline std::vector<int32_t> count_from(int32_t first, int32_t length) {
  std::vector<int32_t> tokens(length);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

inline std::vector<int32_t> joined(std::vector<int32_t> a, const std::vector<int32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// Prompt tokens that were not computed when the request ran to its end alone.
inline int64_t cached_when_run(Rig& rig, const std::vector<int32_t>& prompt, std::string_view salt = {},
                               bool uses_cache = true) {
  const int64_t before = rig.ledger.prefix_stats().num_cached_tokens;
  rig.ledger.add(prompt, {}, 5, 0, salt, uses_cache);
  rig.run();
  EXPECT_EQ(rig.device.fault(), "");
  return rig.ledger.prefix_stats().num_cached_tokens - before;
}

}  // namespace headway::checks
