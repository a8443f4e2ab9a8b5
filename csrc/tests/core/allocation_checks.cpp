// What the ledger allocates, and what happens when it cannot. Part of headway_checks alone, whose operator new counts.
#include <new>
#include <optional>

#include "tests/check.h"
#include "tests/core/fake_device.h"
#include "tests/counting_new.h"

namespace headway::checks {
namespace {

LedgerConfig crowded_config() {
  return {.max_rows = 4,
          .num_blocks = 16,
          .block_size = 4,
          .num_slots = 4,
          .max_model_len = 64,
          .max_step_tokens = 16,
          .vocab_size = 1000,
          .max_logprobs = 2,
          .max_launch_depth = 1};
}

template <typename Body>
int64_t count_allocations(Body&& body) {
  const int64_t before = num_allocations();
  body();
  return num_allocations() - before;
}

// Calls body with its first, second, ... allocation failing until it succeeds; returns how often it failed.
template <typename Body>
int32_t fail_each_allocation(const Ledger& ledger, Body&& body) {
  for (int32_t num_failed = 0;; ++num_failed) {
    fail_allocation(num_failed + 1);
    try {
      body();
      fail_allocation(0);
      return num_failed;
    } catch (const std::bad_alloc&) {
      fail_allocation(0);
      ledger.check_integrity();
    }
  }
}

// Admission, chunks, decode, eviction, abort and commits into reused memory: a ledger allocates when requests come.
int64_t count_allocations_between_requests(const LedgerConfig& config) {
  Rig rig(config);
  SamplingSpec spec;
  spec.num_logprobs = 2;
  for (int32_t i = 0; i < 8; ++i) rig.add(std::vector<int32_t>(10, i % 3), 40, spec);
  rig.changes.num_columns = 2;
  rig.changes.reserve(4, true);
  int64_t num_new = 0;
  for (int32_t step = 0; step < 1000 && rig.ledger.has_unfinished(); ++step) {
    num_new += count_allocations([&] {
      if (step == 20) rig.ledger.abort(2);
      if (step == 25) rig.ledger.pause(3);
      if (step == 30) rig.ledger.evict(1);
      if (step == 35) rig.ledger.resume(3);
    });
    std::optional<Plan> plan;
    num_new += count_allocations([&] { plan = rig.ledger.plan(); });
    if (plan) rig.device.launch(*plan);
    rig.device.run_one();
    num_new += count_allocations([&] { rig.ledger.commit(rig.changes); });
  }
  EXPECT_TRUE(!rig.ledger.has_unfinished());
  EXPECT_TRUE(rig.ledger.stats().num_evictions > 1);
  EXPECT_TRUE(!config.use_prefix_cache || rig.ledger.prefix_stats().num_hits > 0);
  EXPECT_TRUE(!config.use_prefix_cache || rig.ledger.prefix_stats().num_waypoints > 0);
  return num_new;
}

}  // namespace

CHECK_CASE(only_new_requests_allocate) {
  EXPECT_EQ(count_allocations_between_requests(crowded_config()), 0);
}

CHECK_CASE(what_the_prefix_cache_keeps_allocates_nothing) {
  LedgerConfig config = crowded_config();
  config.use_prefix_cache = true;
  config.num_slots = 16;
  config.max_snapshots = 12;
  config.max_waypoints = 6;
  config.snapshot_stride_tokens = 8;
  config.decode_snapshot_stride_tokens = 8;
  EXPECT_EQ(count_allocations_between_requests(config), 0);
}

CHECK_CASE(add_without_memory_changes_nothing) {
  Rig rig(crowded_config());
  SamplingSpec spec;
  spec.stop_ids = {1};
  spec.logit_bias = {{1, 1.0f}};
  for (int64_t id = 1; id <= 5; ++id) {
    int64_t added = 0;
    const std::vector<int32_t> prompt = {1, 2, 3};
    const int32_t num_failed = fail_each_allocation(rig.ledger, [&] { added = rig.add(prompt, 4, spec); });
    EXPECT_TRUE(num_failed >= 4);
    EXPECT_EQ(added, id);
    EXPECT_EQ(rig.ledger.stats().num_waiting, id);
  }
  rig.run();
  EXPECT_EQ(rig.ledger.stats().num_finished, 5);
}

CHECK_CASE(commit_without_memory_changes_nothing) {
  Rig rig(crowded_config());
  SamplingSpec spec;
  spec.num_logprobs = 2;
  const int64_t id = rig.add({1, 2, 3}, 4, spec);
  rig.launch();
  rig.device.run_one();
  const int32_t num_failed = fail_each_allocation(rig.ledger, [&] {
    CommitRecord changes;
    EXPECT_TRUE(rig.ledger.commit(changes));
  });
  EXPECT_EQ(num_failed, 9);  // one a list of the record
  EXPECT_EQ(rig.ledger.output_tokens(id).size(), 1u);
}

}  // namespace headway::checks
