#include "tests/sim/trace.h"

#include <algorithm>

#include "tests/check.h"

namespace headway::sim {
namespace {

// How often what happens, in this trace.
struct Habits {
  int32_t device_delay;
  int32_t transfer_delay;
  int32_t plan_odds;
  int32_t abort_odds;
  int32_t pause_odds;
  int32_t resume_odds;
  int32_t evict_odds;
  int32_t rewind_odds;
  int32_t reset_odds;
};

constexpr int32_t kNever = 1 << 30;

Habits draw_habits(Rng& rng) {
  const auto odds = [&](int32_t usual) { return rng.one_in(3) ? kNever : usual; };
  return {rng.draw(1, 8), rng.draw(1, 4), rng.draw(1, 3), odds(24), odds(16), odds(12), odds(16), odds(12), odds(200)};
}

void disturb(Host& host, Rng& rng, const Habits& habits, TraceCounts& counts) {
  const int64_t id = rng.draw(1, static_cast<int32_t>(host.client.newest_id()) + 1);
  if (rng.one_in(habits.abort_odds)) host.client.abort(id);
  if (rng.one_in(habits.pause_odds)) counts.num_pauses += host.pause(id);
  if (rng.one_in(habits.resume_odds)) host.resume(id);
  if (rng.one_in(habits.evict_odds)) host.evict(id);
  if (rng.one_in(habits.rewind_odds)) host.client.rewind(id, rng.draw(0, 4));
  if (rng.one_in(habits.reset_odds)) host.reset_prefix_cache();
}

}  // namespace

void add_up(const Tally& tally, Tally& total) {
  total.num_tokens += tally.num_tokens;
  total.num_host_stops += tally.num_host_stops;
  total.num_void_results += tally.num_void_results;
  total.num_rewinds += tally.num_rewinds;
  total.num_refused_rewinds += tally.num_refused_rewinds;
  for (size_t i = 0; i < std::size(tally.num_by_reason); ++i) total.num_by_reason[i] += tally.num_by_reason[i];
}

void compare_with_serial(const Client& client, const LedgerConfig& config) {
  const auto num_requests = static_cast<int32_t>(client.conversations().size());
  if (num_requests == 0) return;
  Host serial(ample_config(config, num_requests));
  for (const auto& [id, conversation] : client.conversations()) EXPECT_EQ(serial.client.add(conversation.spec), id);
  serial.drain();
  EXPECT_EQ(serial.ledger.stats().num_evictions, 0);
  for (const auto& [id, conversation] : client.conversations()) {
    const Conversation& expected = serial.client.conversations().at(id);
    if (conversation.reason == FinishReason::kAbort) {
      const std::vector<int32_t>& all = expected.outputs;
      const bool is_beginning = conversation.outputs.size() <= all.size() &&
                                std::equal(conversation.outputs.begin(), conversation.outputs.end(), all.begin());
      EXPECT_TRUE(is_beginning);
      continue;
    }
    EXPECT_TRUE(conversation.outputs == expected.outputs);
    EXPECT_TRUE(conversation.reason == expected.reason);
  }
}

void run_trace(uint64_t seed, TraceCounts& counts) {
  Rng rng(seed);
  const LedgerConfig config = random_config(rng);
  const Habits habits = draw_habits(rng);
  const int32_t num_requests = rng.draw(1, 12);
  Host host(config, rng.one_in(2));
  for (int32_t tick = 0, number = 0; number < num_requests || host.num_steps < 4 * num_requests; ++tick) {
    if (number < num_requests && rng.one_in(4)) {
      RequestSpec request = random_request(rng, config, ++number);
      begin_like(rng, config, host.client.tokens_of_one(rng), request);
      host.client.add(request);
    }
    if (number == num_requests && host.client.num_unfinished() == 0) break;
    if (tick > 1000) break;  // all that is left is paused
    while (!rng.one_in(habits.device_delay) && host.device.advance()) {
    }
    while (!rng.one_in(habits.transfer_delay) && host.run_transfer(rng.one_in(2))) {
    }
    if (rng.one_in(habits.plan_odds)) host.plan();
    if (rng.one_in(2)) host.commit();
    disturb(host, rng, habits, counts);
    host.ledger.check_integrity();
  }
  host.drain();
  host.ledger.check_integrity();
  compare_with_serial(host.client, config);
  ++counts.num_traces;
  ++counts.num_by_depth[config.max_launch_depth];
  counts.num_requests += host.client.newest_id();
  counts.num_steps += host.num_steps;
  counts.num_evictions += host.ledger.stats().num_evictions;
  add_up(host.ledger.prefix_stats(), counts.prefix);
  add_up(host.tally, counts.tally);
}

}  // namespace headway::sim
