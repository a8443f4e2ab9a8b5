#include "tests/sim/host.h"

#include <cstdio>

#include "tests/check.h"

namespace headway::sim {

bool Host::plan() {
  policy_.before_plan(client.newest_id());
  const auto plan = ledger.plan();
  policy_.after_plan(plan);
  while (const Transfer* transfer = ledger.next_transfer()) device.begin(*transfer);
  if (!plan) return false;
  ++num_steps;
  num_silent_steps += plan->packet == nullptr;
  device.launch(*plan);
  return true;
}

bool Host::run_transfer(bool is_out) {
  if (!device.run_transfer(is_out)) return false;
  ledger.finish_transfer(is_out);
  return true;
}

bool Host::commit() {
  check_device();
  const bool is_ready = ledger.is_ready();
  EXPECT_EQ(is_ready, device.num_pending() < static_cast<size_t>(ledger.num_in_flight()));
  const int64_t step = ledger.clock().retired + 1;
  EXPECT_EQ(ledger.commit(changes_), is_ready);
  if (!is_ready) return false;
  EXPECT_EQ(changes_.step, step);
  if (device.num_pending() == 0) ledger.check_mirror(device.mirror());
  client.receive(changes_, ledger.record(step).num_sampled);
  return true;
}

bool Host::pause(int64_t id) {
  Conversation* conversation = client.find(id);
  const bool is_running = conversation != nullptr && !conversation->is_over() && !conversation->is_paused;
  EXPECT_EQ(ledger.pause(id), is_running);
  if (is_running) conversation->is_paused = true;
  return is_running;
}

bool Host::resume(int64_t id) {
  Conversation* conversation = client.find(id);
  const bool is_paused = conversation != nullptr && conversation->is_paused;
  EXPECT_EQ(ledger.resume(id), is_paused);
  if (is_paused) conversation->is_paused = false;
  return is_paused;
}

bool Host::evict(int64_t id) {
  const Request* request = ledger.find(id);
  const bool has_row = request != nullptr && request->row != kDummyRow;
  const bool was_evicted = ledger.evict(id);
  EXPECT_EQ(was_evicted, has_row);
  return was_evicted;
}

// Every step computes a token at least, and who is evicted is computed again; more evictions than this bound allows
// would mean that requests evict each other for ever.
void Host::drain() {
  int64_t num_tokens = 0;
  for (const auto& [id, conversation] : client.conversations()) {
    if (conversation.is_over()) continue;
    resume(id);
    num_tokens += conversation.max_total_len;
  }
  const int64_t max_steps = num_steps + 64 + 16 * num_tokens;
  while (true) {
    while (plan()) {
    }
    const bool has_loaded = run_transfer(false);
    const bool has_moved = run_transfer(true) || has_loaded;
    const bool has_run = device.run_one();
    if (!commit() && !has_run && !has_moved) break;
    EXPECT_TRUE(num_steps <= max_steps);
  }
  check_drained();
}

void Host::check_device() const {
  EXPECT_EQ(device.fault(), "");
}

void Host::reset_prefix_cache() {
  ledger.reset_prefix_cache();
  EXPECT_EQ(ledger.prefix_stats().num_evictable_blocks + ledger.prefix_stats().num_snapshots, 0);
}

void Host::check_drained() {
  const PrefixStats cached = ledger.prefix_stats();
  EXPECT_EQ(ledger.stats().blocks_free + cached.num_blocks, ledger.stats().blocks_total);
  EXPECT_EQ(ledger.stats().slots_free + cached.num_snapshots, ledger.stats().slots_total);
  ledger.check_integrity();
  reset_prefix_cache();
  const Stats stats = ledger.stats();
  EXPECT_TRUE(!ledger.has_unfinished());
  EXPECT_EQ(client.num_unfinished(), 0);
  EXPECT_EQ(stats.num_waiting + stats.num_running + stats.num_paused, 0);
  EXPECT_EQ(stats.blocks_free, stats.blocks_total);
  EXPECT_EQ(stats.slots_free, stats.slots_total);
  EXPECT_EQ(stats.blocks_fenced + stats.slots_fenced, 0);
  EXPECT_EQ(stats.steps_launched, stats.steps_committed);
  EXPECT_EQ(stats.num_finished, client.newest_id());
}

void add_up(const PrefixStats& stats, PrefixStats& total) {
  total.num_hits += stats.num_hits;
  total.num_cached_tokens += stats.num_cached_tokens;
  total.num_waits += stats.num_waits;
  total.num_too_short += stats.num_too_short;
  total.num_without_snapshot += stats.num_without_snapshot;
  total.num_other_salt += stats.num_other_salt;
  total.num_without_kv += stats.num_without_kv;
  total.num_snapshots_taken += stats.num_snapshots_taken;
  total.num_evicted_blocks += stats.num_evicted_blocks;
  total.num_evicted_snapshots += stats.num_evicted_snapshots;
  total.num_saved_blocks += stats.num_saved_blocks;
  total.num_saved_snapshots += stats.num_saved_snapshots;
  total.num_loaded_blocks += stats.num_loaded_blocks;
  total.num_loaded_snapshots += stats.num_loaded_snapshots;
  total.num_host_hits += stats.num_host_hits;
}

void print(const PrefixStats& stats) {
  const auto n = [](int64_t count) { return static_cast<long long>(count); };
  std::printf("\"prefix\": {\"hits\": %lld, \"cached_tokens\": %lld, \"waits\": %lld, \"too_short\": %lld, ",
              n(stats.num_hits), n(stats.num_cached_tokens), n(stats.num_waits), n(stats.num_too_short));
  std::printf("\"without_snapshot\": %lld, \"other_salt\": %lld, \"without_kv\": %lld, \"snapshots\": %lld, ",
              n(stats.num_without_snapshot), n(stats.num_other_salt), n(stats.num_without_kv),
              n(stats.num_snapshots_taken));
  std::printf("\"evicted_blocks\": %lld, \"evicted_snapshots\": %lld}, \"host\": {", n(stats.num_evicted_blocks),
              n(stats.num_evicted_snapshots));
  std::printf("\"saved_blocks\": %lld, \"saved_snapshots\": %lld, \"loaded_blocks\": %lld, ", n(stats.num_saved_blocks),
              n(stats.num_saved_snapshots), n(stats.num_loaded_blocks));
  std::printf("\"loaded_snapshots\": %lld, \"host_hits\": %lld}, ", n(stats.num_loaded_snapshots),
              n(stats.num_host_hits));
}

}  // namespace headway::sim
