#include "tests/core/fake_device.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "tests/check.h"

namespace headway::checks {

FakeDevice::FakeDevice(const LedgerConfig& config)
    : config_(config),
      mirror_(config.max_rows + 1),
      blocks_(config.num_blocks + 1, std::vector<int32_t>(config.block_size, -1)),
      states_(config.num_slots + 1),
      host_blocks_(config.num_host_blocks + 1),
      host_states_(config.num_host_slots + 1) {
  next_token = [vocab_size = config.vocab_size](const std::vector<int32_t>& tokens) {
    uint64_t hash = 17;
    for (const int32_t token : tokens) hash = hash * 6364136223846793005u + static_cast<uint64_t>(token) + 1;
    return static_cast<int32_t>((hash >> 33) % static_cast<uint64_t>(vocab_size));
  };
  for (MirrorRow& row : mirror_) {
    row.block_table.assign(config.max_blocks_per_row(), kDummyBlock);
    row.history.assign(config.max_model_len, -1);
  }
}

void FakeDevice::expect(bool holds, const char* what) {
  if (!holds && fault_.empty()) fault_ = what;
}

void FakeDevice::run(const Transfer& transfer) {
  for (const RecordMove& move : transfer.blocks) {
    if (transfer.is_out) host_blocks_[move.target] = blocks_[move.source];
    if (!transfer.is_out) blocks_[move.target] = host_blocks_[move.source];
  }
  for (const RecordMove& move : transfer.slots) {
    if (transfer.is_out) host_states_[move.target] = states_[move.source];
    if (!transfer.is_out) states_[move.target] = host_states_[move.source];
  }
}

bool FakeDevice::run_one() {
  if (pending_.empty()) return false;
  const Plan plan = pending_.front();
  pending_.pop_front();
  if (plan.packet != nullptr) apply(plan);
  expect(static_cast<int32_t>(live_.size()) == plan.num_rows, "the live list has another length than the plan");
  const auto* header = reinterpret_cast<const PacketHeader*>(plan.packet);
  std::vector<ResultRow> results;
  for (int32_t i = 0; i < plan.num_rows; ++i) {
    const StepRow& step_row = live_[i];
    MirrorRow& row = mirror_[step_row.row];
    if (i < plan.num_decode_rows) {
      expect(row.is_stopped || row.num_computed > 0, "a row decodes without a prompt");
      if (!row.is_stopped) compute(row, row.last_token);
    } else {
      expect(header != nullptr, "a prompt chunk came without a packet");
      const auto* tokens = reinterpret_cast<const int32_t*>(plan.packet + header->tokens_offset);
      restore(row, step_row, tokens + step_row.prompt_begin);
      for (int32_t j = 0; j < step_row.num_tokens; ++j) {
        compute(row, tokens[step_row.prompt_begin + j]);
        take_snapshots(plan, i, row);
      }
    }
    if (i < plan.num_sampled) results.push_back(sample(step_row.row));
  }
  publish(plan, results);
  return true;
}

void FakeDevice::apply(const Plan& plan) {
  const auto& header = *reinterpret_cast<const PacketHeader*>(plan.packet);
  const auto section = [&](uint32_t offset) {
    expect(offset % 16 == 0 && offset <= header.num_bytes, "a section is misplaced");
    return plan.packet + offset;
  };
  expect(header.step == plan.step, "a packet was overwritten before its step ran");
  expect(header.num_bytes == plan.packet_bytes && header.num_bytes <= config_.packet_entry_bytes(), "packet size");
  ++num_packets_;
  num_grants_ += header.num_grants;
  num_inits_ += header.num_inits;
  const auto* inits = reinterpret_cast<const RowInit*>(section(header.inits_offset));
  const auto* words = reinterpret_cast<const int32_t*>(section(header.words_offset));
  for (int32_t i = 0; i < header.num_inits; ++i) reset(inits[i], words + inits[i].words_begin);
  const auto* grants = reinterpret_cast<const BlockGrant*>(section(header.grants_offset));
  for (int32_t i = 0; i < header.num_grants; ++i) mirror_[grants[i].row].block_table[grants[i].index] = grants[i].block;
  const auto* rewinds = reinterpret_cast<const RowRewind*>(section(header.rewinds_offset));
  for (int32_t i = 0; i < header.num_rewinds; ++i) {
    MirrorRow& row = mirror_[rewinds[i].row];
    row.num_computed = rewinds[i].num_computed;
    row.last_token = rewinds[i].last_token;
    row.is_stopped = false;
  }
  const auto* copies = reinterpret_cast<const StateCopy*>(section(header.copies_offset));
  for (int32_t i = 0; i < header.num_copies; ++i) {
    const std::vector<int32_t> state = states_[copies[i].src_slot];
    const auto num_tokens = static_cast<int32_t>(state.size());  // fewer where the device has stopped the row
    expect(num_tokens <= copies[i].position, "a copied state has seen other positions");
    states_[copies[i].dst_slot] = state;
  }
  expect(plan.num_copies == header.num_copies && plan.num_snapshots == header.num_snapshots, "the plan counts others");
  section(header.snapshots_offset);
  const auto* rows = reinterpret_cast<const StepRow*>(section(header.rows_offset));
  live_.assign(rows, rows + header.num_rows);
}

void FakeDevice::reset(const RowInit& init, const int32_t* words) {
  MirrorRow& row = mirror_[init.row];
  row.num_computed = 0;
  row.is_stopped = false;
  std::fill(row.history.begin(), row.history.end(), -1);
  row.slot = init.slot;
  row.sampling = init.sampling;
  row.stop_ids.assign(words, words + init.sampling.num_stop_ids);
  row.logit_bias.clear();
  const int32_t* bias_ids = words + init.sampling.num_stop_ids;
  for (int32_t i = 0; i < init.sampling.num_logit_bias; ++i) {
    float bias = 0.0f;
    std::memcpy(&bias, bias_ids + init.sampling.num_logit_bias + i, sizeof(bias));
    row.logit_bias.emplace_back(bias_ids[i], bias);
  }
  std::fill(row.block_table.begin(), row.block_table.end(), kDummyBlock);
}

// The row goes on from what is cached: blocks as granted, the state that read_slot holds, and the tokens before.
void FakeDevice::restore(MirrorRow& row, const StepRow& step_row, const int32_t* tokens) {
  row.num_computed = step_row.start;
  std::copy_n(tokens - step_row.num_history, step_row.num_history,
              row.history.begin() + step_row.start - step_row.num_history);
  if (config_.num_slots == 0 || step_row.start == 0) return;
  const std::vector<int32_t> state = states_[step_row.read_slot];
  expect(static_cast<int32_t>(state.size()) == step_row.start, "a row continues from a state of other positions");
  states_[row.slot] = state;
}

void FakeDevice::take_snapshots(const Plan& plan, int32_t row_index, const MirrorRow& row) {
  const auto& header = *reinterpret_cast<const PacketHeader*>(plan.packet);
  const auto* snapshots = reinterpret_cast<const StateSnapshot*>(plan.packet + header.snapshots_offset);
  for (int32_t i = 0; i < header.num_snapshots; ++i) {
    const StateSnapshot& snapshot = snapshots[i];
    if (snapshot.row_index != row_index || snapshot.position != row.num_computed) continue;
    states_[snapshot.slot] = states_[row.slot];
  }
}

void FakeDevice::compute(MirrorRow& row, int32_t token) {
  const int32_t position = row.num_computed++;
  row.history[position] = token;
  if (config_.num_blocks > 0) {
    const int32_t block = row.block_table[position / config_.block_size];
    expect(block != kDummyBlock, "a token was computed without a block");
    blocks_[block][position % config_.block_size] = token;
  }
  if (config_.num_slots > 0) {
    expect(row.slot != kDummySlot, "a token was computed without a slot");
    auto& state = states_[row.slot];
    if (position == 0) state.clear();
    state.push_back(token);
  }
}

// The sequence as blocks and state know it. Where they are not a row's own but shared, only the history of what the row
// computed itself can judge them: -1 stands for the rest.
std::vector<int32_t> FakeDevice::read(const MirrorRow& row) {
  std::vector<int32_t> tokens(row.history.begin(), row.history.begin() + row.num_computed);
  const auto agree = [&](int32_t& token, int32_t held, const char* what) {
    if (token < 0) token = held;
    expect(held == token, what);
  };
  for (int32_t i = 0; config_.num_blocks > 0 && i < row.num_computed; ++i) {
    const int32_t held = blocks_[row.block_table[i / config_.block_size]][i % config_.block_size];
    agree(tokens[i], held, "a block was overwritten while it was in use");
  }
  if (config_.num_slots == 0) return tokens;
  const std::vector<int32_t>& state = states_[row.slot];
  expect(state.size() == tokens.size(), "a slot was overwritten while it was in use");
  for (size_t i = 0; i < std::min(state.size(), tokens.size()); ++i) {
    agree(tokens[i], state[i], "a slot was overwritten while it was in use");
  }
  return tokens;
}

ResultRow FakeDevice::sample(int32_t row_id) {
  MirrorRow& row = mirror_[row_id];
  if (row.is_stopped) return {kDummyRow, 0, 0.0f, 1, 1, 0};
  const int32_t token = next_token(read(row));
  const bool is_stop = std::find(row.stop_ids.begin(), row.stop_ids.end(), token) != row.stop_ids.end();
  const int32_t kv_len = row.num_computed;
  row.is_stopped = (is_stop && kv_len >= row.sampling.min_total_len) || kv_len + 1 >= row.sampling.max_total_len;
  row.last_token = token;
  return {row_id, token, -0.5f, 1, row.is_stopped, 0};
}

void FakeDevice::publish(const Plan& plan, const std::vector<ResultRow>& results) {
  auto* rows = reinterpret_cast<ResultRow*>(plan.result + sizeof(ResultHeader));
  auto* top_ids = reinterpret_cast<int32_t*>(rows + config_.max_results());
  auto* top_logprobs = reinterpret_cast<float*>(top_ids + config_.max_results() * config_.max_logprobs);
  for (size_t i = 0; i < results.size(); ++i) {
    rows[i] = results[i];
    if (tamper) tamper(rows[i]);
    for (int32_t k = 0; k < config_.max_logprobs; ++k) {
      top_ids[static_cast<int32_t>(i) * config_.max_logprobs + k] = (results[i].token + k) % config_.vocab_size;
      top_logprobs[static_cast<int32_t>(i) * config_.max_logprobs + k] = -0.5f - static_cast<float>(k);
    }
  }
  auto* header = reinterpret_cast<ResultHeader*>(plan.result);
  header->begin_ns = plan.step * 10;
  header->end_ns = plan.step * 10 + 5;
  header->num_sampled = static_cast<int32_t>(results.size());
  std::atomic_ref<int64_t>(header->step).store(plan.step, std::memory_order_release);
}

bool Rig::launch() {
  const auto planned = ledger.plan();
  ledger.check_integrity();
  if (!planned) return false;
  plan = *planned;
  device.launch(plan);
  return true;
}

bool Rig::retire() {
  if (!device.run_one()) return false;
  EXPECT_EQ(device.fault(), "");
  EXPECT_TRUE(ledger.commit(changes));
  ledger.check_integrity();
  for (size_t i = 0; i < changes.tokens.size(); ++i) {
    const auto reason = static_cast<FinishReason>(changes.finish_reasons[i]);
    if (reason != FinishReason::kError) outputs[changes.request_ids[i]].push_back(changes.tokens[i]);
    reasons[changes.request_ids[i]] = reason;
  }
  return true;
}

void Rig::run(int32_t max_steps) {
  for (int32_t i = 0; i < max_steps; ++i) {
    while (launch()) {
    }
    if (!retire()) return;
  }
  EXPECT_TRUE(!"the ledger does not come to rest");
}

}  // namespace headway::checks
