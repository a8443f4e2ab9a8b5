// The life of a request: prompt, decode, the ways it ends, pause, eviction; alone and launched ahead.
#include "core/error.h"
#include "tests/check.h"
#include "tests/core/fake_device.h"

namespace headway::checks {
namespace {

LedgerConfig small_config(int32_t max_launch_depth = 0) {
  return {.max_rows = 4,
          .num_blocks = 64,
          .block_size = 4,
          .num_slots = 4,
          .max_model_len = 64,
          .max_step_tokens = 16,
          .vocab_size = 1000,
          .max_logprobs = 2,
          .max_launch_depth = max_launch_depth};
}

// Token i of the output is i, whatever the prompt.
void count_up(Rig& rig, int32_t prompt_len) {
  rig.device.next_token = [prompt_len](const std::vector<int32_t>& tokens) {
    return static_cast<int32_t>(tokens.size()) - prompt_len;
  };
}

SamplingSpec stop_at(int32_t token, int32_t min_tokens = 0) {
  SamplingSpec spec;
  spec.stop_ids = {token};
  spec.min_tokens = min_tokens;
  return spec;
}

const std::vector<int32_t> kPrompt = {11, 12, 13};

}  // namespace

CHECK_CASE(a_request_ends_at_its_length) {
  Rig rig(small_config());
  const int64_t id = rig.add(kPrompt, 5);
  rig.run();
  EXPECT_EQ(rig.outputs[id].size(), 5u);
  EXPECT_TRUE(rig.reasons[id] == FinishReason::kLength);
  EXPECT_TRUE(!rig.ledger.has_unfinished());
  EXPECT_EQ(rig.ledger.clock().launched, 5);
}

CHECK_CASE(a_request_ends_at_max_model_len) {
  Rig rig(small_config());
  const int64_t id = rig.add(kPrompt, 1000);
  rig.run();
  EXPECT_EQ(rig.outputs[id].size(), 61u);
  EXPECT_TRUE(rig.reasons[id] == FinishReason::kLength);
}

CHECK_CASE(a_stop_id_ends_a_request_and_is_delivered) {
  Rig rig(small_config());
  count_up(rig, 3);
  const int64_t id = rig.add(kPrompt, 50, stop_at(4));
  rig.run();
  EXPECT_TRUE((rig.outputs[id] == std::vector<int32_t>{0, 1, 2, 3, 4}));
  EXPECT_TRUE(rig.reasons[id] == FinishReason::kStop);
  EXPECT_EQ(rig.changes.stop_tokens[0], 4);
}

CHECK_CASE(a_stop_id_does_not_count_before_min_tokens) {
  for (const int32_t min_tokens : {4, 5}) {
    Rig rig(small_config());
    rig.device.next_token = [](const std::vector<int32_t>&) { return 7; };
    const int64_t id = rig.add(kPrompt, 50, stop_at(7, min_tokens));
    rig.run();
    EXPECT_EQ(static_cast<int32_t>(rig.outputs[id].size()), min_tokens + 1);
  }
}

CHECK_CASE(launching_ahead_changes_no_token) {
  std::map<int64_t, std::vector<int32_t>> serial;
  for (int32_t depth = 0; depth <= 3; ++depth) {
    Rig rig(small_config(depth));
    for (int32_t i = 0; i < 9; ++i) rig.add(std::vector<int32_t>(1 + 5 * i, i), 20, stop_at(3 * i));
    rig.run();
    if (depth == 0) serial = rig.outputs;
    EXPECT_EQ(serial.size(), 9u);
    EXPECT_TRUE(rig.outputs == serial);
  }
}

CHECK_CASE(a_row_decodes_again_before_its_token_has_arrived) {
  Rig rig(small_config(2));
  rig.add(kPrompt, 50);
  EXPECT_TRUE(rig.launch());
  EXPECT_TRUE(rig.launch());
  EXPECT_TRUE(rig.launch());
  EXPECT_EQ(rig.plan.num_decode_rows, 1);
  EXPECT_EQ(rig.plan.max_kv_len, 5);
  EXPECT_TRUE(!rig.launch());
  EXPECT_EQ(rig.ledger.num_in_flight(), 3);
  EXPECT_TRUE(!rig.ledger.is_ready());
  EXPECT_TRUE(!rig.ledger.commit(rig.changes));
}

CHECK_CASE(no_step_is_launched_past_the_last_sample) {
  Rig rig(small_config(3));
  rig.add(kPrompt, 2);
  EXPECT_TRUE(rig.launch());
  EXPECT_TRUE(rig.launch());
  EXPECT_TRUE(!rig.launch());
  EXPECT_EQ(rig.ledger.num_in_flight(), 2);
  EXPECT_TRUE(rig.ledger.has_unfinished());
}

CHECK_CASE(results_after_the_end_are_void) {
  Rig rig(small_config(3));
  count_up(rig, 3);
  const int64_t first = rig.add(kPrompt, 50, stop_at(1));
  const int64_t second = rig.add(kPrompt, 8);
  rig.run();
  EXPECT_TRUE((rig.outputs[first] == std::vector<int32_t>{0, 1}));
  EXPECT_EQ(rig.outputs[second].size(), 8u);
}

CHECK_CASE(memory_in_flight_is_fenced) {
  Rig rig(small_config(2));
  const int64_t id = rig.add(kPrompt, 50);
  while (rig.launch()) {
  }
  EXPECT_TRUE(rig.ledger.abort(id));
  EXPECT_TRUE(!rig.ledger.abort(id));
  EXPECT_EQ(rig.ledger.stats().slots_fenced, 1);
  EXPECT_TRUE(rig.ledger.stats().blocks_fenced > 0);
  for (int32_t step = 1; step <= 3; ++step) {
    EXPECT_EQ(rig.ledger.stats().slots_free, 3);
    EXPECT_TRUE(rig.retire());
    EXPECT_TRUE(rig.changes.tokens.empty());
  }
  EXPECT_EQ(rig.ledger.stats().slots_free, 4);
  EXPECT_EQ(rig.ledger.stats().blocks_free, 64);
}

CHECK_CASE(abort_reaches_a_request_wherever_it_is) {
  Rig rig(small_config(1));
  std::vector<int64_t> ids;
  for (int32_t i = 0; i < 6; ++i) ids.push_back(rig.add(std::vector<int32_t>(30, i), 20));
  EXPECT_TRUE(rig.ledger.abort(ids[5]));  // waiting
  EXPECT_TRUE(rig.launch());
  EXPECT_TRUE(rig.ledger.abort(ids[0]));  // in the middle of its prompt, in flight
  rig.run();
  EXPECT_TRUE(!rig.ledger.abort(ids[1]));  // over
  EXPECT_TRUE(!rig.ledger.abort(999));
  EXPECT_EQ(rig.outputs.size(), 4u);
  EXPECT_EQ(rig.ledger.stats().num_finished, 6);
}

CHECK_CASE(finish_keeps_the_first_outputs) {
  Rig rig(small_config(1));
  count_up(rig, 3);
  const int64_t id = rig.add(kPrompt, 50);
  for (int32_t i = 0; i < 4; ++i) {
    while (rig.launch()) {
    }
    rig.retire();
  }
  EXPECT_THROW(rig.ledger.finish(id, 5), RequestError);
  EXPECT_THROW(rig.ledger.finish(id, -1), RequestError);
  EXPECT_TRUE(rig.ledger.finish(id, 2));
  EXPECT_TRUE(!rig.ledger.finish(id, 2));
  rig.ledger.check_integrity();
  EXPECT_EQ(rig.ledger.output_tokens(id).size(), 2u);
  rig.run();
  EXPECT_EQ(rig.outputs[id].size(), 4u);
  EXPECT_EQ(rig.ledger.stats().slots_free, 4);
  EXPECT_THROW(rig.ledger.output_tokens(id), RequestError);
}

CHECK_CASE(a_paused_row_keeps_its_memory_and_goes_on) {
  Rig alone(small_config());
  const int64_t id = alone.add(kPrompt, 10);
  alone.run();
  Rig rig(small_config(1));
  rig.add(kPrompt, 10);
  rig.launch();
  rig.launch();
  EXPECT_TRUE(rig.ledger.pause(id));
  EXPECT_TRUE(!rig.ledger.pause(id));
  EXPECT_TRUE(!rig.launch());
  EXPECT_TRUE(rig.retire() && rig.retire());
  EXPECT_EQ(rig.outputs[id].size(), 2u);
  EXPECT_EQ(rig.ledger.stats().num_paused, 1);
  EXPECT_EQ(rig.ledger.stats().slots_free, 3);
  EXPECT_TRUE(rig.ledger.resume(id));
  EXPECT_TRUE(!rig.ledger.resume(id));
  rig.run();
  EXPECT_TRUE(rig.outputs == alone.outputs);
  EXPECT_EQ(rig.device.num_inits(), 1);
}

CHECK_CASE(a_paused_waiting_request_lets_others_pass) {
  LedgerConfig config = small_config();
  config.max_rows = 1;
  Rig rig(config);
  const int64_t first = rig.add(kPrompt, 3);
  const int64_t second = rig.add(kPrompt, 3);
  EXPECT_TRUE(rig.ledger.pause(first));
  rig.run();
  EXPECT_EQ(rig.outputs.count(first), 0u);
  EXPECT_EQ(rig.outputs[second].size(), 3u);
  EXPECT_TRUE(rig.ledger.resume(first));
  rig.run();
  EXPECT_EQ(rig.outputs[first].size(), 3u);
}

CHECK_CASE(an_evicted_row_is_recomputed_to_the_same_tokens) {
  for (int32_t depth = 0; depth <= 2; ++depth) {
    Rig rig(small_config(depth));
    const int64_t id = rig.add(kPrompt, 20);
    rig.run();
    Rig evicted(small_config(depth));
    evicted.add(kPrompt, 20);
    for (int32_t i = 0; i < 15; ++i) {
      while (evicted.launch()) {
      }
      if (i % 5 == 2) EXPECT_TRUE(evicted.ledger.evict(id));
      evicted.retire();
    }
    evicted.run();
    EXPECT_TRUE(evicted.outputs == rig.outputs);
    EXPECT_EQ(evicted.ledger.stats().num_evictions, 3);
    EXPECT_TRUE(!evicted.ledger.evict(id));
  }
}

CHECK_CASE(a_result_in_flight_of_an_evicted_row_counts) {
  Rig rig(small_config(1));
  const int64_t id = rig.add(kPrompt, 2);
  rig.launch();
  rig.launch();
  EXPECT_TRUE(rig.ledger.evict(id));
  EXPECT_TRUE(!rig.launch());  // readmitted only when none of its steps is in flight
  rig.retire();
  EXPECT_TRUE(!rig.launch());
  rig.retire();
  EXPECT_EQ(rig.outputs[id].size(), 2u);
  EXPECT_TRUE(!rig.ledger.has_unfinished());
}

CHECK_CASE(bad_logits_end_a_request_alone) {
  Rig rig(small_config(1));
  const int64_t bad = rig.add(kPrompt, 5);
  const int64_t good = rig.add({1, 2}, 5);
  int32_t countdown = 3;
  rig.device.tamper = [&](ResultRow& row) {
    if (row.row == 1 && --countdown == 0) row.is_bad = 1;
  };
  rig.run();
  EXPECT_TRUE(rig.reasons[bad] == FinishReason::kError);
  EXPECT_EQ(rig.outputs[bad].size(), 2u);
  EXPECT_EQ(rig.outputs[good].size(), 5u);
}

CHECK_CASE(a_disagreement_with_the_device_is_an_error) {
  const auto spoil = [](const std::function<void(ResultRow&)>& tamper) {
    Rig rig(small_config());
    rig.add(kPrompt, 5);
    rig.device.tamper = tamper;
    rig.launch();
    rig.device.run_one();
    EXPECT_THROW(rig.ledger.commit(rig.changes), IntegrityError);
  };
  spoil([](ResultRow& row) { row.is_stopped = 1; });
  spoil([](ResultRow& row) { row.row = 2; });
  spoil([](ResultRow& row) { row.row = kDummyRow; });
  spoil([](ResultRow& row) { row.token = 1000; });
  spoil([](ResultRow& row) { row.token = -1; });
}

CHECK_CASE(alternatives_are_reported_to_those_who_asked) {
  Rig rig(small_config());
  count_up(rig, 3);
  rig.add(kPrompt, 2);
  SamplingSpec spec;
  spec.num_logprobs = 1;
  rig.add(kPrompt, 2, spec);
  rig.add(kPrompt, 2);
  rig.launch();
  rig.retire();
  EXPECT_TRUE((rig.changes.top_ids == std::vector<int32_t>{-1, -1, 0, -1, -1, -1}));
  EXPECT_TRUE((rig.changes.top_logprobs == std::vector<float>{0, 0, -0.5f, 0, 0, 0}));
  EXPECT_EQ(rig.changes.begin_ns, 10);
  EXPECT_EQ(rig.changes.end_ns, 15);
}

CHECK_CASE(models_without_attention_or_without_state_work) {
  for (const bool has_blocks : {false, true}) {
    LedgerConfig config = small_config(1);
    (has_blocks ? config.num_slots : config.num_blocks) = 0;
    Rig rig(config);
    for (int32_t i = 0; i < 6; ++i) rig.add(std::vector<int32_t>(20, i), 9);
    rig.run();
    for (const auto& [id, tokens] : rig.outputs) EXPECT_EQ(tokens.size(), 9u);
    EXPECT_EQ(rig.outputs.size(), 6u);
    EXPECT_EQ(rig.device.num_grants() > 0, has_blocks);
  }
}

}  // namespace headway::checks
