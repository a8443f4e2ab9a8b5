// What a step holds: order, budgets, packets, grants, admission.
#include <numeric>

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

std::vector<int32_t> prompt_of(int32_t num_tokens) {
  return std::vector<int32_t>(num_tokens, 5);
}

}  // namespace

CHECK_CASE(steady_decode_sends_no_packet) {
  LedgerConfig config = roomy_config();
  config.grant_ahead_blocks = 8;
  Rig rig(config);
  rig.add(prompt_of(5), 30);
  rig.add(prompt_of(7), 30);
  for (int32_t step = 1; step <= 30; ++step) {
    EXPECT_TRUE(rig.launch());
    EXPECT_EQ(rig.plan.packet == nullptr, step > 1);
    EXPECT_EQ(rig.plan.packet_bytes == 0, step > 1);
    rig.retire();
  }
  EXPECT_EQ(rig.device.num_packets(), 1);
}

CHECK_CASE(several_prompts_share_a_step_and_rows_that_sample_come_first) {
  Rig rig(roomy_config());
  rig.add(prompt_of(3), 9);
  rig.launch();
  rig.retire();
  rig.add(prompt_of(4), 9);
  rig.add(prompt_of(40), 9);
  rig.add(prompt_of(6), 9);
  rig.launch();
  EXPECT_EQ(rig.plan.num_rows, 3);
  EXPECT_EQ(rig.plan.num_decode_rows, 1);
  EXPECT_EQ(rig.plan.num_sampled, 2);
  EXPECT_EQ(rig.plan.num_tokens, 32);
  EXPECT_EQ(rig.plan.max_query_len, 27);
  EXPECT_EQ(rig.plan.max_kv_len, 27);
  rig.retire();
  const auto& live = rig.device.live();
  EXPECT_TRUE(live[0].row == 1 && live[0].prompt_begin == -1 && live[0].start == 3);
  EXPECT_TRUE(live[1].row == 2 && live[1].num_tokens == 4 && live[1].prompt_begin == 0);
  EXPECT_TRUE(live[2].row == 3 && live[2].num_tokens == 27 && live[2].prompt_begin == 4);
  rig.launch();
  EXPECT_EQ(rig.plan.num_rows, 4);
  EXPECT_EQ(rig.plan.num_sampled, 4);
  EXPECT_EQ(rig.plan.num_tokens, 2 + 13 + 6);
}

CHECK_CASE(a_final_chunk_decodes_next_without_a_packet) {
  LedgerConfig config = roomy_config();
  config.max_launch_depth = 1;
  Rig rig(config);
  rig.add(prompt_of(40), 9);
  rig.launch();
  EXPECT_EQ(rig.plan.num_sampled, 0);
  rig.launch();
  EXPECT_EQ(rig.plan.num_sampled, 1);
  EXPECT_EQ(rig.plan.num_tokens, 8);
  rig.retire();
  rig.launch();
  EXPECT_TRUE(rig.plan.packet == nullptr);
}

CHECK_CASE(prompts_are_cut_on_the_grid) {
  LedgerConfig config = roomy_config();
  config.prompt_grid_tokens = 16;
  config.max_step_tokens = 40;
  Rig rig(config);
  rig.add(prompt_of(3), 20);
  rig.launch();
  rig.retire();
  rig.add(prompt_of(70), 9);
  rig.add(prompt_of(50), 9);
  rig.add(prompt_of(5), 9);
  // Two units of the first prompt, whose rest comes next; a unit of the second does not fit into 7 tokens, and the
  // third does not overtake it.
  for (const int32_t num_tokens : {1 + 32, 1 + 38, 2 + 32 + 5}) {
    EXPECT_TRUE(rig.launch() && rig.retire());
    EXPECT_EQ(rig.plan.num_tokens, num_tokens);
  }
  rig.run();
  EXPECT_EQ(rig.outputs.size(), 4u);
}

CHECK_CASE(a_last_chunk_is_not_short) {
  LedgerConfig config = roomy_config();
  config.prompt_grid_tokens = 16;
  config.min_last_chunk_tokens = 9;
  config.max_step_tokens = 36;
  Rig rig(config);
  // A cut at 32 would leave 8 of 40 tokens, so it falls at 16; of 41 it leaves 9.
  for (const auto& pieces : std::vector<std::vector<int32_t>>{{16, 24}, {32, 9}, {36}, {16, 21}}) {
    rig.add(prompt_of(std::accumulate(pieces.begin(), pieces.end(), 0)), 1);
    for (const int32_t num_tokens : pieces) {
      EXPECT_TRUE(rig.launch() && rig.retire());
      EXPECT_EQ(rig.plan.num_tokens, num_tokens);
    }
    rig.run();
  }
  config.max_step_tokens = 23;
  EXPECT_THROW(config.validate(), RequestError);
}

CHECK_CASE(decode_rows_leave_a_held_prompt_its_turn) {
  LedgerConfig config = roomy_config();
  config.prompt_grid_tokens = 8;
  config.max_step_tokens = 8;
  Rig rig(config);
  rig.add(prompt_of(3), 6);
  rig.launch();
  rig.retire();
  const int64_t long_one = rig.add(prompt_of(20), 2);
  for (int32_t i = 0; i < 8; ++i) rig.add(prompt_of(3), 6);  // behind it, though each would fit
  rig.launch();
  rig.retire();
  EXPECT_EQ(rig.plan.num_tokens, 1);
  while (rig.outputs[long_one].empty()) {
    EXPECT_TRUE(rig.launch() && rig.retire());
    EXPECT_TRUE(rig.outputs.size() <= 3);  // the last beside the long prompt's final chunk
  }
  rig.run();
  EXPECT_EQ(rig.outputs.size(), 10u);
}

CHECK_CASE(blocks_are_granted_ahead_and_together) {
  LedgerConfig config = roomy_config();
  config.max_step_tokens = 128;
  Rig rig(config);
  for (int32_t i = 0; i < 8; ++i) rig.add(prompt_of(5 + i), 40);
  rig.run();
  EXPECT_TRUE(rig.device.num_packets() <= 1 + 40 / 4 + 1);
}

CHECK_CASE(no_block_is_granted_ahead_when_few_are_free) {
  LedgerConfig config = roomy_config();
  config.num_blocks = 4;
  config.max_model_len = 17;
  Rig rig(config);
  rig.add(prompt_of(8), 8);
  rig.launch();
  EXPECT_EQ(rig.ledger.blocks().num_free(), 1);  // two for the prompt, one ahead, the last stays in reserve
  Rig tight(config);
  tight.add(prompt_of(4), 8);
  tight.add(prompt_of(4), 8);
  tight.launch();
  EXPECT_EQ(tight.ledger.blocks().num_free(), 2);
}

CHECK_CASE(no_block_is_granted_ahead_that_a_prompt_needs) {
  LedgerConfig config = roomy_config();
  config.num_blocks = 16;
  config.max_model_len = 64;
  config.max_step_tokens = 16;
  config.grant_ahead_blocks = 4;
  Rig rig(config);
  rig.add(prompt_of(4), 30);
  rig.add(prompt_of(40), 4);
  rig.launch();  // 4 blocks for the chunks; of the 12 left, 7 belong to the prompt and 2 stay in reserve
  EXPECT_EQ(rig.ledger.rows().blocks(1).size(), 4u);
}

CHECK_CASE(no_block_is_granted_beyond_the_last_position) {
  LedgerConfig config = roomy_config();
  config.grant_ahead_blocks = 100;
  Rig rig(config);
  rig.add(prompt_of(8), 1);
  rig.add(prompt_of(8), 6);
  rig.launch();
  EXPECT_EQ(rig.ledger.rows().blocks(1).size(), 2u);
  EXPECT_EQ(rig.ledger.rows().blocks(2).size(), 4u);  // 13 positions: the last token is never computed
}

CHECK_CASE(waiting_requests_run_by_priority_then_arrival) {
  LedgerConfig config = roomy_config();
  config.max_rows = 1;
  Rig rig(config);
  const int64_t late = rig.add(prompt_of(3), 1, {}, 5);
  const int64_t second = rig.add(prompt_of(3), 1, {}, 0);
  const int64_t third = rig.add(prompt_of(3), 1, {}, 0);
  const int64_t first = rig.add(prompt_of(3), 1, {}, -1);
  std::vector<int64_t> order;
  while (rig.launch() && rig.retire()) order.push_back(rig.changes.request_ids[0]);
  EXPECT_TRUE((order == std::vector<int64_t>{first, second, third, late}));
}

CHECK_CASE(rows_and_slots_limit_how_many_run) {
  LedgerConfig config = roomy_config();
  config.num_slots = 2;
  Rig rig(config);
  for (int32_t i = 0; i < 5; ++i) rig.add(prompt_of(3), 4);
  rig.launch();
  EXPECT_EQ(rig.plan.num_rows, 2);
  config.num_slots = 8;
  config.max_rows = 3;
  Rig narrow(config);
  for (int32_t i = 0; i < 5; ++i) narrow.add(prompt_of(3), 4);
  narrow.launch();
  EXPECT_EQ(narrow.plan.num_rows, 3);
}

CHECK_CASE(more_rows_than_step_tokens_all_end) {
  LedgerConfig config = roomy_config();
  config.max_step_tokens = 3;
  Rig rig(config);
  for (int32_t i = 0; i < 8; ++i) rig.add(prompt_of(5), 6);
  rig.run();
  EXPECT_EQ(rig.outputs.size(), 8u);
  for (const auto& [id, tokens] : rig.outputs) EXPECT_EQ(tokens.size(), 6u);
}

CHECK_CASE(stop_and_bias_lists_travel_with_the_row) {
  Rig rig(roomy_config());
  SamplingSpec spec;
  spec.seed = 77;
  spec.stop_ids = {900, 901};
  spec.min_tokens = 2;
  spec.logit_bias = {{3, 0.5f}, {4, -1.5f}};
  rig.add(prompt_of(3), 9);
  rig.add(prompt_of(4), 9, spec);
  rig.launch();
  rig.retire();
  const RowSampling& sampling = rig.device.sampling(2);
  EXPECT_EQ(sampling.seed, 77u);
  EXPECT_EQ(sampling.prompt_len, 4);
  EXPECT_EQ(sampling.min_total_len, 6);
  EXPECT_EQ(sampling.max_total_len, 13);
  EXPECT_EQ(sampling.num_stop_ids, 2);
  EXPECT_TRUE(rig.device.logit_bias(2) == spec.logit_bias);
  EXPECT_TRUE(rig.device.logit_bias(1).empty());
}

CHECK_CASE(long_lists_are_spread_over_packets) {
  LedgerConfig config = roomy_config();
  config.max_rows = 200;
  config.num_slots = 0;
  config.max_step_tokens = 200;
  Rig rig(config);
  SamplingSpec spec;
  for (int32_t i = 0; i < kMaxStopIds; ++i) spec.stop_ids.push_back(i);
  for (int32_t i = 0; i < kMaxLogitBias; ++i) spec.logit_bias.emplace_back(i, 1.0f);
  spec.bad_words = {std::vector<int32_t>(kMaxBadWordEntries - 1, 7)};
  spec.min_tokens = 1;
  for (int32_t i = 0; i < 100; ++i) rig.add({999}, 1, spec);
  rig.launch();
  EXPECT_EQ(rig.plan.num_rows, 64);
  rig.run();
  EXPECT_EQ(rig.outputs.size(), 100u);
}

CHECK_CASE(sizes_are_checked) {
  const auto refused = [](int32_t LedgerConfig::* size, int32_t value) {
    LedgerConfig config = roomy_config();
    config.*size = value;
    EXPECT_THROW(config.validate(), RequestError);
  };
  refused(&LedgerConfig::max_rows, 0);
  refused(&LedgerConfig::num_blocks, -1);
  refused(&LedgerConfig::block_size, 0);
  refused(&LedgerConfig::max_step_tokens, 0);
  refused(&LedgerConfig::max_model_len, 1);
  refused(&LedgerConfig::max_launch_depth, -1);
  refused(&LedgerConfig::max_logprobs, 1001);
}

}  // namespace headway::checks
