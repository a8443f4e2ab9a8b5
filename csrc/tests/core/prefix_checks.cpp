// What the prefix cache saves and when: first, second and third sight of a prefix, turns of a conversation, prompts
// that come together, and who must not find what.
#include "tests/check.h"
#include "tests/core/cached_rig.h"

namespace headway::checks {
namespace {

const std::vector<int32_t> kShared = count_from(100, 20);
const std::vector<int32_t> kPrompt = count_from(100, 30);

}  // namespace

CHECK_CASE(a_prompt_seen_before_is_computed_from_its_last_boundary_on) {
  for (const auto& [num_blocks, num_slots] : {std::pair{64, 12}, {64, 0}, {0, 12}}) {
    Rig rig(cached_config(num_blocks, num_slots));
    EXPECT_EQ(cached_when_run(rig, kPrompt), 0);
    EXPECT_EQ(cached_when_run(rig, kPrompt), 28);
    EXPECT_EQ(rig.outputs[1].size(), 5u);
    EXPECT_TRUE(rig.outputs[1] == rig.outputs[2]);
    EXPECT_EQ(rig.ledger.prefix_stats().num_hits, 1);
  }
}

CHECK_CASE(the_next_turn_of_a_conversation_computes_what_is_new) {
  Rig rig(cached_config());
  cached_when_run(rig, kPrompt);
  const auto turn = joined(joined(kPrompt, rig.outputs[1]), {7, 8, 9});
  EXPECT_EQ(cached_when_run(rig, turn), 34);  // the last output was sampled but never computed
  EXPECT_EQ(cached_when_run(rig, turn), 36);  // its leaf is taken; the second one's own boundary serves
}

CHECK_CASE(the_third_prompt_starts_where_the_second_parted_from_the_first) {
  Rig rig(cached_config());
  EXPECT_EQ(cached_when_run(rig, joined(kShared, count_from(300, 10))), 0);
  EXPECT_EQ(cached_when_run(rig, joined(kShared, count_from(400, 10))), 0);
  EXPECT_EQ(rig.ledger.prefix_stats().num_without_snapshot, 1);
  EXPECT_EQ(cached_when_run(rig, joined(kShared, count_from(500, 10))), 20);
}

CHECK_CASE(prompts_that_come_together_compute_their_prefix_once) {
  for (const int32_t num_slots : {12, 0}) {
    Rig rig(cached_config(64, num_slots));
    for (int32_t i = 0; i < 3; ++i) rig.add(joined(kShared, count_from(300 + 20 * i, 10)), 5);
    rig.run();
    EXPECT_EQ(rig.device.fault(), "");
    EXPECT_EQ(rig.ledger.prefix_stats().num_waits, 2);
    EXPECT_EQ(rig.ledger.prefix_stats().num_cached_tokens, 40);
  }
}

CHECK_CASE(others_pass_one_that_waits_for_a_prefix) {
  Rig rig(cached_config());
  rig.add(kPrompt, 5);
  rig.add(kPrompt, 5);
  rig.add(count_from(500, 10), 5);
  EXPECT_TRUE(rig.launch());
  EXPECT_EQ(rig.plan.num_rows, 2);
  EXPECT_TRUE(rig.ledger.find(2)->row == kDummyRow && rig.ledger.find(3)->row != kDummyRow);
  rig.run();
  EXPECT_EQ(rig.ledger.prefix_stats().num_cached_tokens, 28);
}

CHECK_CASE(an_abort_hands_the_work_over) {
  Rig rig(cached_config(64, 12, 1));
  rig.add(kPrompt, 5);
  rig.add(kPrompt, 5);
  rig.add(kPrompt, 5);
  EXPECT_TRUE(rig.launch());
  EXPECT_TRUE(rig.ledger.abort(1));
  rig.run();
  EXPECT_EQ(rig.device.fault(), "");
  EXPECT_EQ(rig.ledger.prefix_stats().num_cached_tokens, 28);  // of the third: the second computed all
  EXPECT_TRUE(rig.outputs[2].size() == 5 && rig.outputs[2] == rig.outputs[3]);
}

CHECK_CASE(nothing_is_found_before_its_step_has_retired) {
  Rig rig(cached_config(64, 12, 1));
  rig.add(kPrompt, 5);
  EXPECT_TRUE(rig.launch());
  EXPECT_EQ(rig.ledger.prefix_cache().tree().num_nodes(), 0);
  EXPECT_TRUE(rig.retire());
  EXPECT_EQ(rig.ledger.prefix_cache().tree().num_nodes(), 7);
  rig.run();
}

CHECK_CASE(a_failed_request_leaves_nothing) {
  LedgerConfig config = cached_config();
  config.max_step_tokens = 8;  // so that some of its prompt is published before it fails
  Rig rig(config);
  rig.device.tamper = [](ResultRow& result) { result.is_bad = 1; };
  rig.add(kPrompt, 5);
  rig.run();
  EXPECT_TRUE(rig.reasons[1] == FinishReason::kError);
  rig.device.tamper = nullptr;
  EXPECT_EQ(cached_when_run(rig, kPrompt), 0);
  EXPECT_EQ(cached_when_run(rig, kPrompt), 28);
}

CHECK_CASE(a_salt_keeps_prefixes_apart) {
  Rig rig(cached_config());
  cached_when_run(rig, kPrompt, "one");
  EXPECT_EQ(cached_when_run(rig, kPrompt, "two"), 0);
  EXPECT_EQ(rig.ledger.prefix_stats().num_other_salt, 1);
  EXPECT_EQ(cached_when_run(rig, kPrompt, "one"), 28);
}

CHECK_CASE(who_opts_out_reads_nothing_and_leaves_nothing) {
  Rig rig(cached_config());
  cached_when_run(rig, kPrompt, "", false);
  EXPECT_EQ(rig.ledger.prefix_stats().num_blocks, 0);
  cached_when_run(rig, kPrompt);
  EXPECT_EQ(cached_when_run(rig, kPrompt, "", false), 0);
  EXPECT_EQ(rig.ledger.prefix_stats().num_lookups, 1);
}

CHECK_CASE(a_reset_hides_what_is_there_and_what_runs) {
  Rig rig(cached_config());
  cached_when_run(rig, kPrompt);
  rig.add(count_from(500, 30), 5);
  EXPECT_TRUE(rig.launch());
  rig.ledger.reset_prefix_cache();
  rig.run();
  EXPECT_EQ(rig.ledger.prefix_stats().num_blocks, 0);
  EXPECT_EQ(rig.ledger.prefix_stats().num_snapshots, 0);
  EXPECT_EQ(cached_when_run(rig, kPrompt), 0);
  EXPECT_EQ(cached_when_run(rig, count_from(500, 30)), 0);
}

CHECK_CASE(a_miss_has_a_reason) {
  Rig rig(cached_config());
  cached_when_run(rig, count_from(1, 4));
  cached_when_run(rig, count_from(50, 9));
  EXPECT_EQ(rig.ledger.prefix_stats().num_too_short, 1);
  EXPECT_EQ(rig.ledger.prefix_stats().num_without_kv, 1);
}

// A little of a prefix is not waited for.
CHECK_CASE(a_short_pending_prefix_is_no_reason_to_wait) {
  Rig rig(cached_config());
  rig.add(joined(count_from(100, 4), count_from(300, 20)), 5);
  rig.add(joined(count_from(100, 4), count_from(400, 20)), 5);
  EXPECT_TRUE(rig.launch());
  EXPECT_EQ(rig.plan.num_rows, 2);
  EXPECT_EQ(rig.ledger.prefix_stats().num_pending, 1);
  rig.run();
}

CHECK_CASE(cached_blocks_count_as_free) {
  Rig rig(cached_config(10, 12));
  cached_when_run(rig, kPrompt);
  EXPECT_EQ(rig.ledger.stats().blocks_free + rig.ledger.prefix_stats().num_evictable_blocks, 10);
  EXPECT_EQ(cached_when_run(rig, count_from(500, 33)), 0);  // needs all but one of the blocks
  EXPECT_EQ(rig.outputs[2].size(), 5u);
  EXPECT_TRUE(rig.ledger.prefix_stats().num_evicted_blocks > 0);
}

// All that the one which gives way holds is cached, and computed again by the one which needs a block.
CHECK_CASE(duplicates_come_free_when_their_owner_gives_way) {
  LedgerConfig config = cached_config(10, 12);
  config.max_snapshots = 0;
  config.grant_ahead_blocks = 0;
  Rig rig(config);
  rig.add(count_from(100, 8), 5);
  EXPECT_TRUE(rig.launch());
  EXPECT_TRUE(rig.retire());
  EXPECT_TRUE(rig.ledger.pause(1));
  rig.add(count_from(100, 20), 14);
  rig.run();
  EXPECT_EQ(rig.device.fault(), "");
  EXPECT_EQ(rig.outputs[2].size(), 14u);
  EXPECT_EQ(rig.ledger.stats().num_evictions, 1);
}

CHECK_CASE(requests_take_slots_from_snapshots) {
  Rig rig(cached_config(64, 2));
  cached_when_run(rig, kPrompt);
  EXPECT_TRUE(rig.ledger.prefix_stats().num_snapshots > 0);
  rig.add(count_from(500, 6), 5);
  rig.add(count_from(600, 6), 5);
  EXPECT_TRUE(rig.launch());
  EXPECT_EQ(rig.plan.num_rows, 2);
  rig.run();
  EXPECT_EQ(rig.device.fault(), "");
}

CHECK_CASE(penalties_see_a_cached_prompt) {
  Rig rig(cached_config());
  SamplingSpec spec;
  spec.repetition_penalty = 1.5f;
  rig.add(kPrompt, 5, spec);
  rig.run();
  rig.add(kPrompt, 5, spec);
  EXPECT_TRUE(rig.launch());
  const auto& header = *reinterpret_cast<const PacketHeader*>(rig.plan.packet);
  EXPECT_EQ(header.num_prompt_tokens, 30);
  EXPECT_EQ(rig.plan.num_tokens, 2);
  rig.run();
}

// With one bit of hash every lookup meets nodes of other prompts.
CHECK_CASE(hash_collisions_do_not_matter) {
  const LedgerConfig config = cached_config(64, 0);
  const StepClock clock;
  BlockPool blocks(config, clock);
  PrefixTree tree(config, clock, blocks, 1);
  const int32_t root = tree.open_root("");
  for (int32_t first = 0; first < 40; first += 4) {
    const auto tokens = count_from(first, 4);
    const int32_t block = blocks.acquire();
    tree.unpin_path(tree.add_child(tree.key(root, tokens), block, 1));
    blocks.release(block, 0);
  }
  tree.check_integrity();
  for (int32_t first = 0; first < 40; ++first) {
    EXPECT_EQ(tree.match(root, count_from(first, 4)).num_tokens, first % 4 == 0 ? 4 : 0);
  }
}

CHECK_CASE(of_old_snapshots_the_one_that_spares_least_goes) {
  LedgerConfig config = cached_config(64, 2);
  config.weighs_snapshot_cost = true;
  const StepClock clock;
  BlockPool blocks(config, clock);
  SlotPool slots(config, clock);
  PrefixTree tree(config, clock, blocks);
  int32_t node = tree.open_root("");
  std::vector<int32_t> path;
  for (int32_t i = 0; i < 6; ++i) {
    const int32_t block = blocks.acquire();
    path.push_back(node = tree.add_child(tree.key(node, count_from(10 * i, 4)), block, 1));
    blocks.release(block, 0);
  }
  for (const int32_t i : {4, 5}) {  // the older one spares 20 tokens, the newer one 4
    SlotTicket ticket = slots.acquire();
    EXPECT_TRUE(tree.attach_snapshot(path[i], ticket, SnapshotKind::kAnchor, false));
  }
  EXPECT_TRUE(tree.evict_snapshot());
  EXPECT_TRUE(tree.has_snapshot(path[4]) && !tree.has_snapshot(path[5]));
  EXPECT_EQ(tree.num_nodes(), 6);  // KV stays
  tree.unpin_path(path.back());
  EXPECT_TRUE(tree.evict_leaf());
  EXPECT_TRUE(tree.evict_leaf());
  EXPECT_EQ(tree.num_snapshots(), 0);  // went with its block
  tree.check_integrity();
}

// All that the paused leader holds is its follower's too: giving it up frees nothing, so the follower goes as well.
CHECK_CASE(a_plan_gives_up_as_many_rows_as_its_first_one_needs) {
  LedgerConfig config = cached_config(4, 0);
  config.max_model_len = 16;
  config.max_step_tokens = 4;
  config.grant_ahead_blocks = 0;
  Rig rig(config);
  const int64_t leader = rig.add(count_from(1, 8), 4);
  rig.launch();
  rig.retire();
  EXPECT_TRUE(rig.ledger.pause(leader));
  const int64_t first = rig.add(count_from(50, 7), 8, {}, -1);
  const int64_t follower = rig.add(count_from(1, 6), 10);
  while (rig.ledger.find(first) != nullptr && !rig.ledger.find(first)->is_finished()) {
    EXPECT_TRUE(rig.launch());
    EXPECT_EQ(rig.ledger.find(leader)->num_evictions, rig.ledger.find(follower)->num_evictions);
    rig.retire();
  }
  EXPECT_EQ(rig.ledger.prefix_stats().num_cached_tokens, 4);
  EXPECT_EQ(rig.ledger.find(leader)->num_evictions, 1);
  EXPECT_TRUE(rig.ledger.resume(leader));
  rig.run();
  EXPECT_EQ(rig.device.fault(), "");
  EXPECT_EQ(rig.outputs[follower].size(), 10u);
}

}  // namespace headway::checks
