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

struct Begun {
  int32_t num_out = 0;
  int32_t num_back = 0;
};

// Runs what is to be copied at once and leaves it to be finished.
Begun begin_transfers(Rig& rig) {
  Begun begun;
  while (const Transfer* transfer = rig.ledger.next_transfer()) {
    ++(transfer->is_out ? begun.num_out : begun.num_back);
    rig.device.run(*transfer);
  }
  return begun;
}

void finish(Rig& rig, const Begun& begun) {
  for (int32_t i = 0; i < begun.num_out; ++i) rig.ledger.finish_transfer(true);
  for (int32_t i = 0; i < begun.num_back; ++i) rig.ledger.finish_transfer(false);
  rig.ledger.check_integrity();
}

void settle(Rig& rig) {
  finish(rig, begin_transfers(rig));
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
    const Begun begun = begin_transfers(rig);
    EXPECT_EQ(begun.num_out, 0);
    EXPECT_EQ(begun.num_back, 1);
    rig.ledger.add(count_from(900, 10), {}, 5);
    EXPECT_TRUE(rig.launch());  // others pass
    EXPECT_EQ(rig.plan.num_rows, 1);
    rig.ledger.check_integrity();
    finish(rig, begun);
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
  finish(rig, {.num_out = num_begun});
  EXPECT_EQ(rig.ledger.stats().blocks_free + rig.ledger.stats().slots_free, num_free + num_moved);
  EXPECT_THROW(rig.ledger.finish_transfer(true), IntegrityError);
  EXPECT_THROW(rig.ledger.finish_transfer(false), IntegrityError);
}

CHECK_CASE(a_reset_empties_both_tiers_and_what_is_between_them) {
  Rig rig(tiered_config(48, 8));
  cached_when_run(rig, kPrompt);
  run_others(rig, 10);
  rig.ledger.add(kPrompt, {}, 5);
  EXPECT_TRUE(!rig.launch());
  EXPECT_EQ(begin_transfers(rig).num_back, 1);
  rig.ledger.reset_prefix_cache();
  rig.ledger.check_integrity();
  finish(rig, {.num_back = 1});
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
  EXPECT_EQ(begin_transfers(rig).num_back, 1);
  EXPECT_TRUE(rig.ledger.abort(id));
  rig.ledger.check_integrity();
  finish(rig, {.num_back = 1});
  EXPECT_EQ(cached_when_run(rig, kPrompt), 28);
}

// The copy back is begun when the copy out is done, and before the copies out that others have begun meanwhile.
CHECK_CASE(what_is_on_its_way_to_host_memory_comes_back_when_it_has_arrived) {
  Rig rig(tiered_config(48, 8));
  cached_when_run(rig, kPrompt);
  Begun leaving;
  for (int32_t i = 0; leaving.num_out == 0; ++i) {
    rig.ledger.add(count_from(300 + 40 * i, 30), {}, 5);
    rig.run();
    leaving = begin_transfers(rig);
  }
  rig.ledger.add(kPrompt, {}, 5);
  EXPECT_TRUE(!rig.launch());
  EXPECT_EQ(begin_transfers(rig).num_back, 0);
  finish(rig, leaving);
  EXPECT_TRUE(!rig.launch());
  const Transfer* first = rig.ledger.next_transfer();
  EXPECT_TRUE(first != nullptr && !first->is_out);
  if (first == nullptr) return;
  rig.device.run(*first);
  finish(rig, {.num_back = 1});
  settle(rig);
  rig.run();
  EXPECT_EQ(rig.ledger.prefix_stats().num_host_hits, 1);
  EXPECT_EQ(rig.device.fault(), "");
}

}  // namespace headway::checks
