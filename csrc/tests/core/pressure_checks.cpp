// More requests than memory: refusal, eviction, pauses that give way, and random traces in tiny pools.
#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "core/error.h"
#include "tests/check.h"
#include "tests/core/fake_device.h"

namespace headway::checks {
namespace {

LedgerConfig roomy_config() {
  return {.max_rows = 8,
          .num_blocks = 256,
          .block_size = 4,
          .num_slots = 8,
          .max_model_len = 128,
          .max_step_tokens = 32,
          .vocab_size = 1000,
          .max_logprobs = 0};
}

// Eight blocks, no slack, and nothing granted ahead.
LedgerConfig tight_config() {
  LedgerConfig config = roomy_config();
  config.num_blocks = 8;
  config.max_model_len = 32;
  config.grant_ahead_blocks = 0;
  return config;
}

std::vector<int32_t> prompt_of(int32_t num_tokens) {
  return std::vector<int32_t>(num_tokens, 5);
}

}  // namespace

CHECK_CASE(the_youngest_row_is_evicted_for_an_older_one) {
  Rig rig(tight_config());
  const int64_t old = rig.add(prompt_of(12), 20);
  const int64_t young = rig.add(prompt_of(12), 20);
  rig.run();
  EXPECT_TRUE(rig.ledger.stats().num_evictions >= 1);
  EXPECT_EQ(rig.outputs[old].size(), 20u);
  EXPECT_TRUE(rig.outputs[old] == rig.outputs[young]);
}

CHECK_CASE(a_row_is_never_evicted_for_one_it_outranks) {
  Rig rig(tight_config());
  const int64_t low = rig.add(prompt_of(12), 20, {}, 1);
  const int64_t high = rig.add(prompt_of(12), 20, {}, 0);
  while (rig.launch() && rig.retire()) {
    if (const Request* request = rig.ledger.find(high)) EXPECT_EQ(request->num_evictions, 0);
  }
  EXPECT_EQ(rig.outputs[high].size(), 20u);
  EXPECT_EQ(rig.outputs[low].size(), 20u);
}

// Four rows, all at a block boundary, in a full pool.
CHECK_CASE(fenced_blocks_are_awaited_rather_than_another_row_evicted) {
  LedgerConfig config = tight_config();
  config.max_launch_depth = 3;
  Rig rig(config);
  for (const int32_t prompt_len : {12, 12, 4, 4}) rig.add(prompt_of(prompt_len), 10);
  rig.launch();
  EXPECT_EQ(rig.ledger.blocks().num_free(), 0);
  EXPECT_TRUE(!rig.launch());  // the fourth is evicted for the first; its block is coming, so nobody else is
  EXPECT_EQ(rig.ledger.stats().num_evictions, 1);
  EXPECT_EQ(rig.ledger.blocks().num_fenced(), 1);
  EXPECT_TRUE(!rig.launch());
  EXPECT_EQ(rig.ledger.stats().num_evictions, 1);
  rig.run();
  for (int64_t id = 1; id <= 4; ++id) EXPECT_EQ(rig.outputs[id].size(), 10u);
}

CHECK_CASE(blocks_of_a_row_at_its_last_sample_are_awaited) {
  LedgerConfig config = tight_config();
  config.max_launch_depth = 1;
  Rig rig(config);
  rig.add(prompt_of(12), 1);
  rig.add(prompt_of(16), 10);
  rig.add(prompt_of(4), 10);
  rig.launch();
  EXPECT_EQ(rig.ledger.blocks().num_free(), 0);
  EXPECT_TRUE(!rig.launch());
  rig.retire();
  EXPECT_TRUE(rig.launch());
  EXPECT_EQ(rig.plan.num_rows, 2);
  EXPECT_EQ(rig.ledger.stats().num_evictions, 0);
}

// A paused row outranks a running one of lower priority: the latter goes first.
CHECK_CASE(the_lowest_priority_is_evicted_first) {
  Rig rig(tight_config());
  const int64_t paused = rig.add(prompt_of(8), 4, {}, 1);
  const int64_t low = rig.add(prompt_of(12), 4, {}, 2);
  const int64_t high = rig.add(prompt_of(12), 4, {}, 0);
  rig.launch();
  rig.retire();
  rig.ledger.pause(paused);
  rig.launch();
  EXPECT_EQ(rig.ledger.find(low)->num_evictions, 1);
  EXPECT_EQ(rig.ledger.find(paused)->num_evictions, 0);
  EXPECT_EQ(rig.ledger.find(high)->num_evictions, 0);
}

// Six blocks are free for the six it needs, but the running row's next one would then evict it again.
CHECK_CASE(an_evicted_row_comes_back_when_running_rows_have_a_block_to_spare) {
  Rig rig(tight_config());
  rig.add(prompt_of(4), 6);
  const int64_t evicted = rig.add(prompt_of(20), 6);
  rig.launch();
  rig.retire();
  rig.ledger.evict(evicted);
  rig.launch();
  EXPECT_EQ(rig.plan.num_rows, 1);
  EXPECT_EQ(rig.ledger.blocks().num_free(), 6);
  rig.retire();
  rig.run();
  EXPECT_EQ(rig.outputs[evicted].size(), 6u);
  EXPECT_EQ(rig.ledger.stats().num_evictions, 1);
}

CHECK_CASE(a_paused_row_gives_way_to_its_equals) {
  Rig rig(tight_config());
  const int64_t paused = rig.add(prompt_of(16), 10);
  rig.launch();
  rig.retire();
  rig.ledger.pause(paused);
  const int64_t other = rig.add(prompt_of(20), 10);
  rig.run();
  EXPECT_EQ(rig.outputs[other].size(), 10u);
  EXPECT_EQ(rig.outputs[paused].size(), 1u);
  rig.ledger.resume(paused);
  rig.run();
  EXPECT_EQ(rig.outputs[paused].size(), 10u);
}

CHECK_CASE(a_paused_row_keeps_its_memory_before_lower_priorities) {
  Rig rig(tight_config());
  const int64_t paused = rig.add(prompt_of(16), 10, {}, 0);
  rig.launch();
  rig.retire();
  rig.ledger.pause(paused);
  const int64_t other = rig.add(prompt_of(20), 10, {}, 1);
  rig.run();
  EXPECT_EQ(rig.outputs.count(other), 0u);
  EXPECT_EQ(rig.ledger.stats().num_evictions, 0);
  rig.ledger.resume(paused);
  rig.run();
  EXPECT_EQ(rig.outputs[other].size(), 10u);
}

CHECK_CASE(what_can_never_run_is_refused_and_changes_nothing) {
  LedgerConfig config = roomy_config();
  config.num_blocks = 8;
  config.max_model_len = 64;
  Rig rig(config);
  const auto refused = [&](const std::vector<int32_t>& prompt, int32_t max_new_tokens, const SamplingSpec& spec) {
    return EXPECT_THROW(rig.add(prompt, max_new_tokens, spec), RequestError).parameter();
  };
  const auto too_large = EXPECT_THROW(rig.add(prompt_of(20), 14), CapacityError);
  EXPECT_EQ(too_large.hint(), "raise num_blocks to 9 or lower max_new_tokens");
  EXPECT_EQ(EXPECT_THROW(rig.add(prompt_of(64), 1), CapacityError).parameter(), "len(prompt)");
  EXPECT_EQ(refused({}, 1, {}), "len(prompt)");
  EXPECT_EQ(refused({1000}, 1, {}), "prompt");
  EXPECT_EQ(refused({-1}, 1, {}), "prompt");
  EXPECT_EQ(refused({1}, 0, {}), "max_new_tokens");
  EXPECT_EQ(refused({1}, 2, {.min_tokens = 3}), "min_tokens");
  EXPECT_EQ(refused({1}, 2, {.min_tokens = -1}), "min_tokens");
  EXPECT_EQ(refused({1}, 2, {.num_logprobs = 1}), "num_logprobs");
  EXPECT_EQ(refused({1}, 2, {.num_logprobs = -2}), "num_logprobs");
  EXPECT_EQ(refused({1}, 2, {.stop_ids = {1000}}), "stop_ids");
  EXPECT_EQ(refused({1}, 2, {.stop_ids = std::vector<int32_t>(kMaxStopIds + 1, 1)}), "len(stop_ids)");
  EXPECT_EQ(refused({1}, 2, {.logit_bias = {{-1, 1.0f}}}), "logit_bias");
  EXPECT_TRUE(!rig.ledger.has_unfinished());
  const int64_t id = rig.add(prompt_of(20), 13);  // 33 tokens: the last needs no block
  rig.run();
  EXPECT_EQ(id, 1);
  EXPECT_EQ(rig.outputs[id].size(), 13u);
}

namespace {

// Draws from a range, both ends included.
class Draws {
 public:
  explicit Draws(uint32_t seed) : random_(seed) {}
  int32_t operator()(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(random_); }

 private:
  std::mt19937 random_;
};

LedgerConfig tiny_pools(Draws& draw, int32_t launch_depth) {
  LedgerConfig config = roomy_config();
  config.max_rows = draw(1, 5);
  config.num_slots = draw(0, 4);
  config.block_size = draw(1, 5);
  config.max_model_len = 40;
  config.num_blocks = draw(0, 3) == 0 ? 0 : 40 / config.block_size + draw(0, 6);
  config.max_step_tokens = draw(1, 24);
  config.max_launch_depth = launch_depth;
  config.grant_ahead_blocks = draw(0, 2);
  if (draw(0, 2) == 0) config.prompt_grid_tokens = draw(1, config.max_step_tokens);
  const int32_t num_spare = config.max_step_tokens - config.prompt_grid_tokens + 1;
  config.min_last_chunk_tokens = draw(1, std::min(config.prompt_grid_tokens, num_spare));
  return config;
}

std::vector<int32_t> outputs_alone(const std::vector<int32_t>& prompt, int32_t max_new_tokens,
                                   const SamplingSpec& spec) {
  Rig alone({.max_rows = 1,
             .num_blocks = 40,
             .block_size = 1,
             .num_slots = 1,
             .max_model_len = 40,
             .max_step_tokens = 40,
             .vocab_size = 1000});
  alone.add(prompt, max_new_tokens, spec);
  alone.run();
  return alone.outputs[1];
}

using Expected = std::map<int64_t, std::vector<int32_t>>;  // by request, what it gives on an idle machine

void add_one(Rig& rig, Draws& draw, Expected& expected) {
  const std::vector<int32_t> prompt(draw(1, 20), draw(0, 9));
  SamplingSpec spec;
  for (int32_t i = 0; i < 60; ++i) spec.stop_ids.push_back(draw(0, 999));
  const int32_t max_new_tokens = draw(1, 19);
  try {
    const int64_t id = rig.add(prompt, max_new_tokens, spec, draw(0, 2));
    expected[id] = outputs_alone(prompt, max_new_tokens, spec);
  } catch (const CapacityError&) {  // it can never fit
  }
}

void do_anything(Rig& rig, Draws& draw, Expected& expected) {
  const int64_t id = draw(1, 12);
  const int32_t what = draw(0, 13);
  if (what == 0) {
    add_one(rig, draw, expected);
  } else if (what == 1) {
    rig.ledger.pause(id);
  } else if (what == 2) {
    rig.ledger.resume(id);
  } else if (what == 3) {
    rig.ledger.evict(id);
  } else if (what == 4) {
    if (draw(0, 9) == 0) rig.ledger.abort(id);
  } else if (what <= 8) {
    rig.retire();
  } else {
    rig.launch();
  }
}

}  // namespace

// Tiny pools, every call at random: nobody is lost, nothing leaks, and the tokens are those of an idle machine.
CHECK_CASE(random_traces_keep_every_invariant) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    Draws draw(seed);
    Rig rig(tiny_pools(draw, static_cast<int32_t>(seed % 4)));
    Expected expected;
    for (int32_t op = 0; op < 300; ++op) {
      do_anything(rig, draw, expected);
      rig.ledger.check_integrity();
    }
    for (const auto& [id, tokens] : expected) rig.ledger.resume(id);
    rig.run();
    EXPECT_TRUE(!rig.ledger.has_unfinished());
    for (const auto& [id, tokens] : expected) {
      const auto& outputs = rig.outputs[id];
      const bool is_over = rig.reasons[id] != FinishReason::kNotFinished;
      EXPECT_TRUE(is_over ? outputs == tokens : std::equal(outputs.begin(), outputs.end(), tokens.begin()));
    }
  }
}

}  // namespace headway::checks
