// The prefix cache's host tier: what leaves and when, who waits for what returns, and what a reset leaves.
#include "tests/check.h"
#include "tests/core/cached_rig.h"

namespace headway::checks {
namespace {

const std::vector<int32_t> kPrompt = count_from(100, 30);

LedgerConfig tiered_config(int32_t num_blocks, int32_t num_slots) {
  LedgerConfig config = cached_config(num_blocks, num_slots);
  config.max_step_tokens = 32;
  config.num_host_blocks = num_blocks > 0 ? 100 : 0;
  config.num_host_slots = num_slots > 0 ? 40 : 0;
  return config;
}

// Runs what is to be copied at once and leaves it to be finished; returns how many.
int32_t begin_transfers(Rig& rig, bool* is_out = nullptr) {
  int32_t num_begun = 0;
  while (const Transfer* transfer = rig.ledger.next_transfer()) {
    ++num_begun;
    rig.device.run(*transfer);
    if (is_out != nullptr) *is_out = transfer->is_out;
  }
  return num_begun;
}

void settle(Rig& rig) {
  for (int32_t i = begin_transfers(rig); i > 0; --i) rig.ledger.finish_transfer();
  rig.ledger.check_integrity();
}

void run_others(Rig& rig, int32_t num_others) {
  for (int32_t i = 0; i < num_others; ++i) {
    rig.ledger.add(count_from(300 + 40 * i, 30), {}, 5);
    rig.run();
    settle(rig);
  }
}

}  // namespace

CHECK_CASE(what_has_left_the_device_comes_back_before_its_request_runs) {
  for (const auto& [num_blocks, num_slots] : {std::pair{48, 8}, {48, 0}, {0, 8}}) {
    Rig rig(tiered_config(num_blocks, num_slots));
    cached_when_run(rig, kPrompt);
    run_others(rig, 10);
    const PrefixStats before = rig.ledger.prefix_stats();
    rig.ledger.add(kPrompt, {}, 5);
    EXPECT_TRUE(!rig.launch());  // it waits
    bool is_out = true;
    EXPECT_EQ(begin_transfers(rig, &is_out), 1);
    EXPECT_TRUE(!is_out);
    rig.ledger.add(count_from(900, 10), {}, 5);
    EXPECT_TRUE(rig.launch());  // others pass
    EXPECT_EQ(rig.plan.num_rows, 1);
    rig.ledger.check_integrity();
    rig.ledger.finish_transfer();
    rig.ledger.check_integrity();
    rig.run();
    const PrefixStats after = rig.ledger.prefix_stats();
    EXPECT_EQ(after.num_cached_tokens - before.num_cached_tokens, 28);
    EXPECT_EQ(after.num_host_hits, 1);
    EXPECT_EQ(after.num_loaded_snapshots, num_slots > 0);
    EXPECT_EQ(after.num_loaded_blocks > 0, num_blocks > 0);
    EXPECT_EQ(rig.device.fault(), "");
  }
}

CHECK_CASE(a_block_that_leaves_is_free_when_its_copy_is_done) {
  Rig rig(tiered_config(48, 8));
  cached_when_run(rig, kPrompt);
  for (int32_t i = 0; rig.ledger.stats().num_transfers == 0; ++i) {
    rig.ledger.add(count_from(300 + 40 * i, 30), {}, 5);
    rig.run();
  }
  const int64_t num_free = rig.ledger.stats().blocks_free + rig.ledger.stats().slots_free;
  int64_t num_moved = 0;
  int32_t num_begun = 0;
  for (; const Transfer* transfer = rig.ledger.next_transfer(); ++num_begun) {
    num_moved += static_cast<int64_t>(transfer->blocks.size() + transfer->slots.size());
  }
  EXPECT_TRUE(num_moved > 0);
  for (; num_begun > 0; --num_begun) rig.ledger.finish_transfer();
  EXPECT_EQ(rig.ledger.stats().blocks_free + rig.ledger.stats().slots_free, num_free + num_moved);
  EXPECT_THROW(rig.ledger.finish_transfer(), IntegrityError);
}

CHECK_CASE(a_reset_empties_both_tiers_and_what_is_between_them) {
  Rig rig(tiered_config(48, 8));
  cached_when_run(rig, kPrompt);
  run_others(rig, 10);
  rig.ledger.add(kPrompt, {}, 5);
  EXPECT_TRUE(!rig.launch());
  EXPECT_EQ(begin_transfers(rig), 1);
  rig.ledger.reset_prefix_cache();
  rig.ledger.check_integrity();
  rig.ledger.finish_transfer();
  rig.ledger.check_integrity();
  const PrefixStats stats = rig.ledger.prefix_stats();
  EXPECT_EQ(stats.num_blocks + stats.num_snapshots + stats.num_host_blocks + stats.num_host_snapshots, 0);
  rig.run();
  EXPECT_EQ(rig.ledger.prefix_stats().num_hits, 0);
}

CHECK_CASE(another_salt_finds_nothing_in_host_memory) {
  Rig rig(tiered_config(48, 8));
  cached_when_run(rig, kPrompt, "a");
  run_others(rig, 10);
  EXPECT_EQ(cached_when_run(rig, kPrompt, "b"), 0);
  EXPECT_EQ(rig.ledger.prefix_stats().num_host_hits, 0);
}

CHECK_CASE(an_abort_while_a_prefix_returns_leaves_it_to_others) {
  Rig rig(tiered_config(48, 8));
  cached_when_run(rig, kPrompt);
  run_others(rig, 10);
  const int64_t id = rig.ledger.add(kPrompt, {}, 5, 0, "");
  EXPECT_TRUE(!rig.launch());
  EXPECT_EQ(begin_transfers(rig), 1);
  EXPECT_TRUE(rig.ledger.abort(id));
  rig.ledger.check_integrity();
  rig.ledger.finish_transfer();
  rig.ledger.check_integrity();
  EXPECT_EQ(cached_when_run(rig, kPrompt), 28);
}

}  // namespace headway::checks
