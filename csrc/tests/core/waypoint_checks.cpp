// States on the way of prompts and outputs: what they spare at second sight, and what they never push out.
#include <algorithm>

#include "tests/check.h"
#include "tests/core/cached_rig.h"

namespace headway::checks {
namespace {

constexpr int32_t kUnit = 4;
constexpr int32_t kStride = 16;

LedgerConfig waypoint_config(int32_t max_snapshots = 40, int32_t max_waypoints = 30) {
  LedgerConfig config = cached_config(128, max_snapshots + 4);
  config.max_snapshots = max_snapshots;
  config.max_waypoints = max_waypoints;
  config.snapshot_stride_tokens = kStride;
  return config;
}

int64_t num_anchors(const Rig& rig) {
  const PrefixStats stats = rig.ledger.prefix_stats();
  return stats.num_snapshots - stats.num_waypoints;
}

// A tree of one path of six nodes, the last one's still pinned.
struct Path {
  explicit Path(const LedgerConfig& given) : config(given) {
    int32_t node = tree.open_root("");
    for (int32_t i = 0; i < 6; ++i) {
      const int32_t block = blocks.acquire();
      nodes.push_back(node = tree.add_child(tree.key(node, count_from(10 * i, 4)), block, 1));
      blocks.release(block, 0);
    }
  }
  void keep(int32_t i, SnapshotKind kind) {
    SlotTicket ticket = slots.acquire();
    EXPECT_TRUE(tree.attach_snapshot(nodes[i], ticket, kind, false));
    tree.check_integrity();
  }

  const LedgerConfig config;
  const StepClock clock;
  BlockPool blocks{config, clock};
  SlotPool slots{config, clock};
  PrefixTree tree{config, clock, blocks};
  std::vector<int32_t> nodes;
};

}  // namespace

// Less than a stride is computed again, about half of what is shared, or about what the first prompt had beyond it.
CHECK_CASE(the_second_prompt_finds_most_of_what_it_shares) {
  const auto first = count_from(100, 56);
  for (int32_t num_shared = kUnit; num_shared < 56; ++num_shared) {
    Rig rig(waypoint_config());
    EXPECT_EQ(cached_when_run(rig, first), 0);
    const std::vector<int32_t> shared(first.begin(), first.begin() + num_shared);
    const int64_t again = num_shared - cached_when_run(rig, joined(shared, {1, 2, 3}));
    const int64_t most = std::min({kStride - 1, num_shared / 2 + 1, 56 - num_shared + 2 * kUnit});
    EXPECT_TRUE(again <= most);
  }
}

CHECK_CASE(a_stride_doubles_until_a_prompt_leaves_room_for_others) {
  Rig rig(waypoint_config(8, 4));
  cached_when_run(rig, count_from(100, 56));  // 16, 32 and 48 would be three of four
  EXPECT_EQ(rig.ledger.prefix_stats().num_waypoints, 2);
  EXPECT_EQ(cached_when_run(rig, joined(count_from(100, 34), {1, 2, 3})), 32);
}

CHECK_CASE(a_prompt_in_many_chunks_leaves_the_same_waypoints) {
  LedgerConfig config = waypoint_config();
  Rig whole(config);
  config.max_step_tokens = 7;
  config.prompt_grid_tokens = 1;
  Rig parts(config);
  cached_when_run(whole, count_from(100, 56));
  cached_when_run(parts, count_from(100, 56));
  EXPECT_TRUE(whole.ledger.prefix_stats().num_waypoints > 4);
  EXPECT_EQ(whole.ledger.prefix_stats().num_waypoints, parts.ledger.prefix_stats().num_waypoints);
}

CHECK_CASE(waypoints_push_out_waypoints_alone) {
  Rig rig(waypoint_config(8, 2));
  for (int32_t i = 0; i < 8; ++i) cached_when_run(rig, count_from(1 + 50 * i, 40));
  EXPECT_EQ(rig.ledger.prefix_stats().num_waypoints, 2);
  EXPECT_EQ(num_anchors(rig), 6);
  Path path(waypoint_config(6, 3));
  path.keep(1, SnapshotKind::kAnchor);
  path.keep(3, SnapshotKind::kWaypoint);
  EXPECT_TRUE(path.tree.evict_snapshot(SnapshotKind::kWaypoint));
  EXPECT_TRUE(!path.tree.evict_snapshot(SnapshotKind::kWaypoint));
  EXPECT_TRUE(path.tree.has_snapshot(path.nodes[1]));
}

CHECK_CASE(a_slot_is_taken_from_a_waypoint_first) {
  Path path(waypoint_config(6, 3));
  path.keep(1, SnapshotKind::kAnchor);  // older
  path.keep(3, SnapshotKind::kWaypoint);
  EXPECT_TRUE(path.tree.evict_snapshot());
  EXPECT_TRUE(path.tree.has_snapshot(path.nodes[1]) && !path.tree.has_snapshot(path.nodes[3]));
  EXPECT_TRUE(path.tree.evict_snapshot());
  EXPECT_EQ(path.tree.num_snapshots(), 0);
}

// The one that spares least goes, however young: a prompt's waypoints thin out.
CHECK_CASE(old_waypoints_thin_out) {
  Path path(waypoint_config(6, 6));
  for (const int32_t i : {0, 2, 3}) path.keep(i, SnapshotKind::kWaypoint);  // they spare 4, 8 and 4 tokens
  path.keep(5, SnapshotKind::kWaypoint);
  EXPECT_TRUE(path.tree.evict_snapshot(SnapshotKind::kWaypoint));
  EXPECT_TRUE(path.tree.evict_snapshot(SnapshotKind::kWaypoint));
  EXPECT_TRUE(path.tree.has_snapshot(path.nodes[2]) && path.tree.has_snapshot(path.nodes[5]));
}

CHECK_CASE(a_waypoint_where_prompts_part_becomes_an_anchor) {
  Rig rig(waypoint_config());
  cached_when_run(rig, count_from(100, 30));
  const int64_t before = num_anchors(rig);
  EXPECT_EQ(cached_when_run(rig, joined(count_from(100, 16), {7})), 16);
  EXPECT_EQ(num_anchors(rig), before + 2);  // the waypoint, and the second request's own end
}

CHECK_CASE(an_evicted_request_goes_on_from_its_output) {
  LedgerConfig config = waypoint_config();
  config.decode_snapshot_stride_tokens = 8;
  for (const int32_t depth : {0, 2}) {
    config.max_launch_depth = depth;
    Rig plain(cached_config());
    plain.add(count_from(100, 6), 40);
    plain.run();
    Rig rig(config);
    const int64_t id = rig.add(count_from(100, 6), 40);
    while (rig.outputs[id].size() < 22) {
      while (rig.launch()) {
      }
      rig.retire();
    }
    EXPECT_TRUE(rig.ledger.evict(id));  // of 28 tokens, 24 can be found
    while (rig.retire()) {
    }
    EXPECT_TRUE(rig.launch());
    EXPECT_TRUE(rig.plan.num_tokens <= 4 + depth);
    rig.run();
    EXPECT_EQ(rig.device.fault(), "");
    EXPECT_TRUE(rig.outputs[id] == plain.outputs[1]);
  }
}

CHECK_CASE(another_request_goes_on_from_the_middle_of_an_output) {
  LedgerConfig config = waypoint_config();
  config.decode_snapshot_stride_tokens = 8;
  Rig rig(config);
  rig.add(count_from(100, 6), 40);
  rig.run();
  std::vector<int32_t> tokens = joined(count_from(100, 6), rig.outputs[1]);
  tokens.resize(27);
  EXPECT_EQ(cached_when_run(rig, joined(tokens, {1, 2})), 24);
  config.caches_outputs = false;
  Rig other(config);
  other.add(count_from(100, 6), 40);
  other.run();
  EXPECT_TRUE(cached_when_run(other, joined(tokens, {1, 2})) <= 6);
}

// The blocks of its output can be others' too: it does not write them again.
CHECK_CASE(a_request_set_back_behind_a_waypoint_leaves_its_row) {
  LedgerConfig config = waypoint_config();
  config.decode_snapshot_stride_tokens = 8;
  config.state_window = {.num_tokens = 16, .max_rewind = 8};
  for (const auto& [num_positions, num_evicted] : {std::pair{2, 0}, {4, 1}}) {
    Rig rig(config);
    const int64_t id = rig.add(count_from(100, 6), 40);
    while (rig.outputs[id].size() < 21) {
      EXPECT_TRUE(rig.launch());
      rig.retire();
    }
    EXPECT_EQ(rig.ledger.prefix_cache().tree().num_nodes(), 6);  // to 24 of 27 tokens
    EXPECT_TRUE(rig.ledger.rewind(id, num_positions));
    EXPECT_EQ(rig.ledger.stats().num_evictions, num_evicted);
  }
}

}  // namespace headway::checks
