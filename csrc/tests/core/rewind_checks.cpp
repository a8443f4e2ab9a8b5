// Going back: what a rewind takes away, what goes on from there, and where it is refused.
#include "core/error.h"
#include "tests/check.h"
#include "tests/core/fake_device.h"

namespace headway::checks {
namespace {

// Attention alone: KV can be cut anywhere.
LedgerConfig attention_config(int32_t max_launch_depth) {
  return {.max_rows = 3,
          .num_blocks = 64,
          .block_size = 4,
          .num_slots = 0,
          .max_model_len = 64,
          .max_step_tokens = 16,
          .vocab_size = 1000,
          .max_logprobs = 0,
          .max_launch_depth = max_launch_depth};
}

LedgerConfig hybrid_config(int32_t max_launch_depth) {
  LedgerConfig config = attention_config(max_launch_depth);
  config.num_slots = 3;
  return config;
}

const std::vector<int32_t> kPrompt = {11, 12, 13};

// Outputs as the ledger has them: those that were rewound are taken back.
std::vector<int32_t> known(const Rig& rig, int64_t id) {
  const auto outputs = rig.ledger.output_tokens(id);
  return {outputs.begin(), outputs.end()};
}

std::vector<int32_t> undisturbed(const LedgerConfig& config, int32_t num_tokens, const SamplingSpec& spec = {}) {
  Rig rig(config);
  const int64_t id = rig.add(kPrompt, num_tokens, spec);
  rig.run();
  return rig.outputs[id];
}

}  // namespace

CHECK_CASE(a_rewound_request_goes_on_as_if_it_had_never_gone_further) {
  const auto expected = undisturbed(attention_config(0), 20);
  for (int32_t depth = 0; depth <= 3; ++depth) {
    for (int32_t num_steps = 1; num_steps < 14; ++num_steps) {
      for (int32_t num_positions = 0; num_positions < num_steps; ++num_positions) {
        Rig rig(attention_config(depth));
        const int64_t id = rig.add(kPrompt, 20);
        for (int32_t i = 0; i < num_steps; ++i) {
          while (rig.launch()) {
          }
          rig.retire();
        }
        while (rig.launch()) {
        }
        EXPECT_TRUE(rig.ledger.rewind(id, num_positions));
        rig.ledger.check_integrity();
        auto outputs = known(rig, id);
        EXPECT_EQ(static_cast<int32_t>(outputs.size()), num_steps - num_positions);
        rig.outputs.clear();
        rig.run();
        for (const int32_t token : rig.outputs[id]) outputs.push_back(token);  // GCC 13 warns of a bound in insert
        EXPECT_TRUE(outputs == expected);
        EXPECT_EQ(rig.ledger.stats().blocks_free, rig.ledger.stats().blocks_total);
      }
    }
  }
}

CHECK_CASE(a_rewind_takes_back_a_stop_that_only_the_device_has_seen) {
  const auto plain = undisturbed(attention_config(0), 12);
  SamplingSpec spec;
  spec.stop_ids = {plain[4]};
  Rig rig(attention_config(3));
  const int64_t id = rig.add(kPrompt, 12, spec);
  for (int32_t i = 0; i < 4; ++i) {
    while (rig.launch()) {
    }
    rig.retire();
  }
  while (rig.launch()) {
  }
  while (rig.device.num_pending() > 0) rig.device.run_one();  // it has stopped, and the host does not know
  EXPECT_TRUE(rig.ledger.rewind(id, 2));
  while (rig.ledger.num_in_flight() > 0) {
    EXPECT_TRUE(rig.ledger.commit(rig.changes));
    EXPECT_TRUE(rig.changes.request_ids.empty());
  }
  EXPECT_EQ(known(rig, id).size(), 2u);
  rig.run();
  EXPECT_TRUE(rig.reasons[id] == FinishReason::kStop);
  EXPECT_EQ(rig.outputs[id].back(), plain[4]);
}

CHECK_CASE(others_in_the_step_keep_their_results) {
  const auto expected = undisturbed(attention_config(0), 12);
  Rig rig(attention_config(2));
  const int64_t other = rig.add(kPrompt, 12);
  const int64_t rewound = rig.add({21, 22}, 12);
  for (int32_t i = 0; i < 8; ++i) {
    while (rig.launch()) {
    }
    rig.retire();
    if (i == 3) rig.ledger.rewind(rewound, 1);
  }
  EXPECT_EQ(known(rig, rewound).size(), 5u);  // of 8, one was dropped and two in flight were void
  rig.run();
  EXPECT_TRUE(rig.outputs[other] == expected);
}

CHECK_CASE(the_news_of_a_rewind_goes_with_its_row) {
  Rig rig(attention_config(0));
  const int64_t id = rig.add(kPrompt, 12);
  for (int32_t i = 0; i < 5; ++i) {
    rig.launch();
    rig.retire();
  }
  EXPECT_TRUE(rig.ledger.rewind(id, 3));
  EXPECT_TRUE(rig.ledger.rewind(id, 1));  // the later one counts
  EXPECT_EQ(rig.ledger.rows().rewinds().size(), 1u);
  EXPECT_EQ(rig.ledger.rows().rewinds()[0].num_computed, 3);
  EXPECT_TRUE(rig.ledger.evict(id));  // the next holder of the row must not be rewound
  EXPECT_TRUE(rig.ledger.rows().rewinds().empty());
  const auto kept = known(rig, id);
  rig.outputs.clear();
  rig.run();
  EXPECT_EQ(kept.size() + rig.outputs[id].size(), 12u);
}

// A prompt of higher priority takes the row's memory after the row was planned: what it samples then still counts.
CHECK_CASE(a_row_that_gives_way_in_the_plan_after_its_rewind_decodes_from_where_it_was_set_back_to) {
  const auto expected = undisturbed(attention_config(0), 12);
  LedgerConfig config = attention_config(0);
  config.num_blocks = 8;
  config.grant_ahead_blocks = 0;
  config.prompt_grid_tokens = 4;
  Rig rig(config);
  const int64_t id = rig.add(kPrompt, 12, {}, 1);
  for (int32_t i = 0; i < 7; ++i) {
    if (i == 5) rig.add(std::vector<int32_t>(24, 5), 1, {}, 0);  // admitted with six blocks free, of which one is lost
    rig.launch();
    rig.retire();
  }
  EXPECT_TRUE(rig.ledger.rewind(id, 1));
  EXPECT_TRUE(rig.launch());
  EXPECT_EQ(rig.ledger.find(id)->num_evictions, 1);
  EXPECT_EQ(rig.plan.num_decode_rows, 1);  // planned before it gave way
  rig.retire();
  auto outputs = known(rig, id);
  EXPECT_EQ(outputs.size(), 7u);
  rig.outputs.clear();
  rig.run();
  for (const int32_t token : rig.outputs[id]) outputs.push_back(token);
  EXPECT_TRUE(outputs == expected);
}

CHECK_CASE(a_rewind_that_is_out_of_reach_is_refused_and_changes_nothing) {
  for (const bool is_hybrid : {false, true}) {
    Rig rig(is_hybrid ? hybrid_config(1) : attention_config(1));
    const int64_t id = rig.add(kPrompt, 12);
    EXPECT_THROW(rig.ledger.rewind(id, 1), RequestError);
    EXPECT_TRUE(rig.ledger.rewind(id, 0));  // it waits: nothing is dropped
    for (int32_t i = 0; i < 4; ++i) {
      while (rig.launch()) {
      }
      rig.retire();
    }
    EXPECT_THROW(rig.ledger.rewind(id, -1), RequestError);
    EXPECT_THROW(rig.ledger.rewind(id, 4), RequestError);  // the first output is not sampled again
    if (is_hybrid) {
      EXPECT_THROW(rig.ledger.rewind(id, 0), RequestError);  // its state has seen the step in flight
    }
    EXPECT_TRUE(!rig.ledger.rewind(id + 1, 0));
    rig.run();
    EXPECT_TRUE(rig.outputs[id] == undisturbed(is_hybrid ? hybrid_config(0) : attention_config(0), 12));
    EXPECT_TRUE(!rig.ledger.rewind(id, 0));
  }
}

// Cuts leave a prompt a last chunk of some length; what is taken back of its end must not shorten that.
CHECK_CASE(a_rewind_of_a_prompt_that_was_cut_leaves_no_shorter_rest_than_the_cut) {
  LedgerConfig config = attention_config(0);
  config.max_step_tokens = 8;
  config.prompt_grid_tokens = 4;
  config.min_last_chunk_tokens = 3;
  for (int32_t num_positions = 0; num_positions <= 4; ++num_positions) {
    Rig rig(config);
    const int64_t id = rig.add(kPrompt, 20);
    for (int32_t i = 0; i < 10; ++i) {
      rig.launch();
      rig.retire();
    }
    EXPECT_TRUE(rig.ledger.evict(id));
    EXPECT_TRUE(rig.launch());  // 13 tokens are known: 8 run, 5 are left
    EXPECT_EQ(rig.plan.num_tokens, 8);
    rig.retire();
    EXPECT_TRUE(rig.ledger.rewind(id, num_positions));
    EXPECT_EQ(rig.ledger.find(id)->row == kDummyRow, num_positions == 3 || num_positions == 4);
    auto outputs = known(rig, id);
    rig.outputs.clear();
    EXPECT_TRUE(rig.launch());
    while (rig.plan.num_sampled == 0) {
      rig.retire();
      EXPECT_TRUE(rig.launch());
    }
    EXPECT_TRUE(rig.plan.num_tokens >= config.min_last_chunk_tokens);
    rig.run();
    outputs.insert(outputs.end(), rig.outputs[id].begin(), rig.outputs[id].end());
    EXPECT_TRUE(outputs == undisturbed(config, 20));
  }
}

CHECK_CASE(a_request_that_lost_its_row_goes_back_whatever_the_model) {
  Rig rig(hybrid_config(1));
  const int64_t id = rig.add(kPrompt, 12);
  for (int32_t i = 0; i < 6; ++i) {
    while (rig.launch()) {
    }
    rig.retire();
  }
  while (rig.launch()) {
  }
  EXPECT_TRUE(rig.ledger.evict(id));
  EXPECT_TRUE(rig.ledger.rewind(id, 5));
  auto outputs = known(rig, id);
  rig.outputs.clear();
  rig.run();
  outputs.insert(outputs.end(), rig.outputs[id].begin(), rig.outputs[id].end());
  EXPECT_TRUE(outputs == undisturbed(hybrid_config(0), 12));
}

}  // namespace headway::checks
