#include "tests/sim/device.h"

#include <algorithm>

#include "cpu/ops.h"

namespace headway::sim {
namespace {

constexpr int32_t kNoBlock = -1;  // a table entry that no grant has filled

}  // namespace

Device::Device(const LedgerConfig& config, bool has_replays)
    : config_(config),
      has_replays_(has_replays),
      fixed_packet_(config.packet_entry_bytes()),
      sampling_(config.max_rows + 1),
      live_(config.max_rows + 1),
      results_(config.max_rows),
      top_ids_(int64_t{config.max_rows} * config.max_logprobs),
      top_logprobs_(int64_t{config.max_rows} * config.max_logprobs),
      admissions_(config.max_rows + 1, 0),
      cells_((int64_t{config.num_blocks} + 1) * config.block_size),
      states_(config.num_slots + 1) {
  const int64_t num_rows = config.max_rows + 1;
  const int64_t num_tokens = std::max(config.max_step_tokens, config.max_rows);
  const auto ints = [this](int64_t count) { return int_buffers_.emplace_back(count, 0).data(); };
  bias_values_.resize(num_rows * kMaxLogitBias);
  token_masks_.resize(num_rows * config.mask_words());
  mirror_ = {.max_rows = config.max_rows + 1,
             .max_blocks_per_row = config.max_blocks_per_row(),
             .max_model_len = config.max_model_len,
             .mask_words = config.mask_words(),
             .last_token = ints(num_rows),
             .num_computed = ints(num_rows),
             .state_base = ints(num_rows),
             .slot = ints(num_rows),
             .stopped = ints(num_rows),
             .block_table = ints(num_rows * config.max_blocks_per_row()),
             .history = ints(num_rows * config.max_model_len),
             .sampling = sampling_.data(),
             .stop_ids = ints(num_rows * kMaxStopIds),
             .bias_ids = ints(num_rows * kMaxLogitBias),
             .bias_values = bias_values_.data(),
             .bad_words = ints(num_rows * kMaxBadWordEntries),
             .token_masks = token_masks_.data(),
             .live = live_.data(),
             .counter = has_replays ? &counter_ : nullptr};
  inputs_ = {.token_ids = ints(num_tokens),
             .positions = ints(num_tokens),
             .token_rows = ints(num_tokens),
             .rows = ints(num_rows),
             .query_start = ints(num_rows + 1),
             .row_start = ints(num_rows),
             .kv_lens = ints(num_rows),
             .read_slots = ints(num_rows),
             .write_slots = ints(num_rows),
             .state_base = ints(num_rows),
             .sample_tokens = ints(num_rows),
             .snapshot_starts = ints(num_rows + 1),
             .snapshot_positions = ints(config.max_packet_snapshots()),
             .snapshot_slots = ints(config.max_packet_snapshots()),
             .score_tokens = nullptr,
             .score_rows = nullptr,
             .score_targets = nullptr};
}

bool Device::advance() {
  if (pending_.empty()) return false;
  const Plan& plan = pending_.front();
  switch (phase_) {
    case Phase::kBegin:
      begin(plan);
      phase_ = Phase::kWrite;
      break;
    case Phase::kWrite:
      write(plan);
      phase_ = Phase::kFinish;
      break;
    case Phase::kFinish:
      finish(plan);
      phase_ = Phase::kBegin;
      pending_.pop_front();
  }
  return true;
}

bool Device::run_one() {
  const size_t num_before = pending_.size();
  while (pending_.size() == num_before && advance()) {
  }
  return pending_.size() < num_before;
}

void Device::begin(const Plan& plan) {
  if (plan.packet != nullptr) forget_tables(plan);
  expect(plan.num_rows == num_live_, "the plan has another number of rows than the newest packet");
  if (is_replayed(plan)) {
    begin_replayed(plan);
  } else {
    cpu::begin_step({.packet = plan.packet,
                     .num_rows = plan.num_rows,
                     .num_decode_rows = plan.num_decode_rows,
                     .num_sampled = plan.num_sampled,
                     .num_tokens = plan.num_tokens,
                     .mirror = mirror_,
                     .inputs = inputs_},
                    nullptr);
  }
  if (plan.packet != nullptr) check_bias_lists(plan);
  check_inputs(plan);
}

// An old packet stays where it is when the step brings none.
void Device::begin_replayed(const Plan& plan) {
  if (plan.packet != nullptr) std::copy_n(plan.packet, plan.packet_bytes, fixed_packet_.begin());
  cpu::begin_step({.packet = fixed_packet_.data(),
                   .num_rows = config_.max_rows,
                   .num_decode_rows = config_.max_rows,
                   .num_sampled = config_.max_rows,
                   .num_tokens = config_.max_rows,
                   .mirror = mirror_,
                   .inputs = inputs_,
                   .is_replayed = true},
                  nullptr);
  expect(counter_.step == plan.step, "the device counts other steps than the host");
  for (int32_t i = plan.num_rows; i < config_.max_rows; ++i) expect(inputs_.rows[i] == kDummyRow, "padding is a row");
}

void Device::check_inputs(const Plan& plan) {
  expect(inputs_.query_start[plan.num_rows] == plan.num_tokens, "the rows' tokens are not the plan's");
  for (int32_t i = 0; i < plan.num_rows; ++i) {
    const int32_t num_tokens = inputs_.query_start[i + 1] - inputs_.query_start[i];
    expect(num_tokens <= plan.max_query_len, "a row is longer than the plan says");
    expect(inputs_.kv_lens[i] <= plan.max_kv_len, "a row has more KV than the plan says");
    if (i < plan.num_decode_rows) {
      expect(num_tokens == 1, "a decode row has several tokens");
    } else if (inputs_.rows[i] != kDummyRow) {
      const bool is_final = i < plan.num_sampled;
      expect(inputs_.row_start[i] % config_.prompt_grid_tokens == 0, "a chunk starts off the grid");
      expect(is_final || inputs_.kv_lens[i] % config_.prompt_grid_tokens == 0, "a chunk is cut off the grid");
    }
  }
}

// begin_step leaves a new row's table as it was; here stale entries are made to show.
void Device::forget_tables(const Plan& plan) {
  const auto& header = *reinterpret_cast<const PacketHeader*>(plan.packet);
  expect(header.step == plan.step, "a packet was overwritten before its step ran");
  expect(header.num_bytes == plan.packet_bytes, "a packet has another size than the plan says");
  expect(header.num_rows == plan.num_rows && header.num_decode_rows == plan.num_decode_rows &&
             header.num_sampled == plan.num_sampled && header.num_tokens == plan.num_tokens,
         "a packet has other counts than the plan");
  num_live_ = header.num_rows;
  const auto* inits = reinterpret_cast<const RowInit*>(plan.packet + header.inits_offset);
  for (int32_t i = 0; i < header.num_inits; ++i) {
    const int64_t row = inits[i].row;
    ++admissions_[row];
    std::fill_n(mirror_.block_table + row * mirror_.max_blocks_per_row, mirror_.max_blocks_per_row, kNoBlock);
  }
}

void Device::check_bias_lists(const Plan& plan) {
  const auto& header = *reinterpret_cast<const PacketHeader*>(plan.packet);
  const auto* inits = reinterpret_cast<const RowInit*>(plan.packet + header.inits_offset);
  for (int32_t i = 0; i < header.num_inits; ++i) {
    const RowSampling& sampling = sampling_[inits[i].row];
    const int64_t begin = int64_t{inits[i].row} * kMaxLogitBias;
    for (int32_t k = 0; k < sampling.num_logit_bias; ++k) {
      expect(mirror_.bias_ids[begin + k] == bias_token(sampling.seed, k, config_.vocab_size), "a bias id is wrong");
      expect(mirror_.bias_values[begin + k] == bias_value(k), "a bias value is wrong");
    }
  }
}

void Device::write(const Plan& plan) {
  for (int32_t i = 0; i < plan.num_rows; ++i) {
    const int32_t row = inputs_.rows[i];
    if (row == kDummyRow) continue;
    expect(row > 0 && row <= config_.max_rows, "a step names no row");
    expect(inputs_.row_start[i] > 0 || i >= plan.num_decode_rows, "a row decodes without a prompt");
    if (config_.num_slots > 0) write_state(i, row);
    if (config_.num_blocks == 0) continue;
    for (int32_t t = inputs_.query_start[i]; t < inputs_.query_start[i + 1]; ++t) {
      write_cell(row, inputs_.positions[t], inputs_.token_ids[t]);
    }
  }
}

void Device::write_cell(int32_t row, int32_t position, int32_t token) {
  expect(position >= 0 && position < config_.max_model_len, "a position is out of range");
  if (!fault_.empty()) return;
  const int32_t block = mirror_.block_table[int64_t{row} * mirror_.max_blocks_per_row + position / config_.block_size];
  expect(block > 0 && block <= config_.num_blocks, "a token is written without a block");
  if (!fault_.empty()) return;
  cells_[int64_t{block} * config_.block_size + position % config_.block_size] = {tag(row, position), token};
}

void Device::write_state(int32_t i, int32_t row) {
  const int32_t slot = inputs_.write_slots[i];
  expect(slot > 0 && slot <= config_.num_slots, "a row has no slot");
  if (!fault_.empty()) return;
  State& state = states_[slot];
  if (inputs_.row_start[i] == 0) state = {tag(row, 0), 0, Context(sampling_[row].seed)};
  expect(state.tag == tag(row, 0), "a slot was overwritten while it was in use");
  expect(state.num_tokens == inputs_.row_start[i], "a state has seen other positions than the step says");
  for (int32_t t = inputs_.query_start[i]; t < inputs_.query_start[i + 1]; ++t) {
    state.context.append(inputs_.token_ids[t]);
    ++state.num_tokens;
  }
}

void Device::finish(const Plan& plan) {
  for (int32_t i = 0; i < plan.num_sampled; ++i) {
    results_[i] = sample(i);
    for (int32_t k = 0; k < config_.max_logprobs; ++k) {
      top_ids_[int64_t{i} * config_.max_logprobs + k] = alternative(results_[i].token, k, config_.vocab_size);
      top_logprobs_[int64_t{i} * config_.max_logprobs + k] = logprob_of(results_[i].token) - static_cast<float>(k);
    }
  }
  if (plan.packet != nullptr) {
    const auto& header = *reinterpret_cast<const PacketHeader*>(plan.packet);
    expect(header.step == plan.step, "a packet was overwritten before its step ended");
  }
  FinishStepParams params = {.step = plan.step,
                             .num_rows = plan.num_rows,
                             .num_decode_rows = plan.num_decode_rows,
                             .num_sampled = plan.num_sampled,
                             .num_scored = 0,
                             .max_logprobs = config_.max_logprobs,
                             .mirror = mirror_,
                             .inputs = inputs_,
                             .results = results_.data(),
                             .top_ids = top_ids_.data(),
                             .top_logprobs = top_logprobs_.data(),
                             .ring_entry = plan.result,
                             .ring_max_results = config_.max_results()};
  if (is_replayed(plan)) {
    params.step = 0;
    params.num_rows = params.num_decode_rows = params.num_sampled = config_.max_rows;
    params.ring_num_entries = config_.max_in_flight();
    params.ring_entry_bytes = config_.result_entry_bytes();
    params.ring_entry -= plan.step % params.ring_num_entries * params.ring_entry_bytes;
  }
  cpu::finish_step(params, nullptr);
}

ResultRow Device::sample(int32_t i) {
  const int32_t row = inputs_.rows[i];
  const int32_t kv_len = inputs_.kv_lens[i];
  if (row == kDummyRow) return {kDummyRow, 0, 0.0f, 1, 1, 0};
  const bool has_both = config_.num_blocks > 0 && config_.num_slots > 0;
  const Context context = config_.num_blocks > 0 ? read_cells(row, kv_len) : read_state(row, kv_len);
  if (has_both) expect(context == read_state(row, kv_len), "blocks and state tell different stories");
  // As the samplers report bad logits: no verdict, the row goes on with token 0 until the host ends it.
  if (context.is_bad()) return {row, 0, 0.0f, 0, 0, 1};
  const int32_t token = context.next_token(config_.vocab_size);
  return {row, token, logprob_of(token), rank_of(token), is_stopped(row, token, kv_len), 0};
}

bool Device::is_stopped(int32_t row, int32_t token, int32_t kv_len) const {
  const RowSampling& sampling = sampling_[row];
  const int32_t* stops = mirror_.stop_ids + int64_t{row} * kMaxStopIds;
  const bool is_stop = std::find(stops, stops + sampling.num_stop_ids, token) != stops + sampling.num_stop_ids;
  return (is_stop && kv_len >= sampling.min_total_len) || kv_len + 1 >= sampling.max_total_len;
}

Context Device::read_cells(int32_t row, int32_t num_tokens) {
  Context context(sampling_[row].seed);
  const int32_t* table = mirror_.block_table + int64_t{row} * mirror_.max_blocks_per_row;
  for (int32_t position = 0; position < num_tokens; ++position) {
    const int32_t block = table[position / config_.block_size];
    expect(block > 0 && block <= config_.num_blocks, "a token is read without a block");
    if (!fault_.empty()) return context;
    const Cell& cell = cells_[int64_t{block} * config_.block_size + position % config_.block_size];
    expect(cell.tag == tag(row, position), "a block was overwritten while it was in use");
    context.append(cell.token);
  }
  return context;
}

Context Device::read_state(int32_t row, int32_t num_tokens) {
  const int32_t slot = mirror_.slot[row];
  expect(slot > 0 && slot <= config_.num_slots, "a sampled row has no slot");
  if (!fault_.empty()) return {};
  expect(states_[slot].tag == tag(row, 0), "a slot was overwritten before it was read");
  expect(states_[slot].num_tokens == num_tokens, "a state has seen other positions than its row");
  return states_[slot].context;
}

uint64_t Device::tag(int32_t row, int32_t position) const {
  const uint64_t writer = mix(sampling_[row].seed) + (admissions_[row] << 20) + static_cast<uint64_t>(row);
  return mix(mix(writer) + static_cast<uint64_t>(position));
}

}  // namespace headway::sim
