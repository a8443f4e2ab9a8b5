#include "tests/sim/device.h"

#include <algorithm>
#include <utility>

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
      has_begun_(config.max_rows + 1, 0),
      cells_((int64_t{config.num_blocks} + 1) * config.block_size),
      states_(config.num_slots + 1),
      host_cells_((int64_t{config.num_host_blocks} + 1) * config.block_size),
      host_states_(config.num_host_slots + 1),
      host_base_(config.num_host_slots + 1) {
  const int64_t num_rows = config.max_rows + 1;
  const int64_t num_tokens = std::max(config.max_step_tokens, config.max_rows);
  const auto ints = [this](int64_t count) { return int_buffers_.emplace_back(count, 0).data(); };
  bias_values_.resize(num_rows * kMaxLogitBias);
  token_masks_.resize(num_rows * config.mask_words());
  mirror_ = {.max_rows = config.max_rows + 1,
             .max_blocks_per_row = config.max_blocks_per_row(),
             .max_model_len = config.max_model_len,
             .mask_words = config.mask_words(),
             .state_window = config.state_window,
             .last_token = ints(num_rows),
             .num_computed = ints(num_rows),
             .state_base = ints(config.num_slots + 1),
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
  copy_states(plan);
  if (config_.num_slots > 0) check_slots(plan);
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
      const bool is_first = std::exchange(has_begun_[inputs_.rows[i]], 1) == 0;
      const bool is_restored = config_.use_prefix_cache && is_first;
      expect(is_restored || inputs_.row_start[i] % config_.prompt_grid_tokens == 0, "a chunk starts off the grid");
      expect(is_final || inputs_.kv_lens[i] % config_.prompt_grid_tokens == 0, "a chunk is cut off the grid");
      const bool may_be_short = is_first && (inputs_.row_start[i] == 0 || config_.caches_outputs);
      const bool is_short = !may_be_short && num_tokens < config_.min_last_chunk_tokens;
      expect(!is_final || !is_short, "the last chunk is too short");
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
    has_begun_[row] = 0;
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
    if (config_.num_slots > 0) write_state(plan, i, row);
    if (config_.num_blocks == 0) continue;
    for (int32_t t = inputs_.query_start[i]; t < inputs_.query_start[i + 1]; ++t) {
      write_cell(row, inputs_.positions[t], inputs_.token_ids[t]);
    }
  }
}

void Device::write_cell(int32_t row, int32_t position, int32_t token) {
  expect(position >= 0 && position < config_.max_model_len, "a position is out of range");
  if (!fault_.empty()) return;
  const uint64_t before = content_before(row, position);
  const Cell* written = cell(row, position);
  if (fault_.empty()) cells_[written - cells_.data()] = {Context::extend(before, token), token};
}

const Device::Cell* Device::cell(int32_t row, int32_t position) {
  const int32_t block = mirror_.block_table[int64_t{row} * mirror_.max_blocks_per_row + position / config_.block_size];
  expect(block > 0 && block <= config_.num_blocks, "a token is written or read without a block");
  if (!fault_.empty()) return nullptr;
  return &cells_[int64_t{block} * config_.block_size + position % config_.block_size];
}

uint64_t Device::content_before(int32_t row, int32_t position) {
  if (position == 0) return Context(sampling_[row].seed).content();
  const Cell* before = cell(row, position - 1);
  return before == nullptr ? 0 : before->content;
}

// A row continues from the state that read_slots names, and leaves states after some of its tokens in other slots.
void Device::write_state(const Plan& plan, int32_t i, int32_t row) {
  State state = states_[inputs_.read_slots[i]];
  const bool is_decode = i < plan.num_decode_rows;
  if (inputs_.row_start[i] == 0) state = {.content = Context(sampling_[row].seed).content(), .num_tokens = 0};
  if (is_decode) go_back(state, inputs_.row_start[i], inputs_.state_base[i]);
  expect(is_decode || !state.has_log, "a state is read before its log is folded");
  expect(state.num_tokens == inputs_.row_start[i], "a state has seen other positions than the step says");
  const bool has_cells = config_.num_blocks > 0 && fault_.empty();
  expect(!has_cells || state.content == content_before(row, inputs_.row_start[i]), "a row continues a foreign state");
  const bool has_snapshots = plan.num_snapshots > 0;
  int32_t next = has_snapshots ? inputs_.snapshot_starts[i] : 0;
  const int32_t end = has_snapshots ? inputs_.snapshot_starts[i + 1] : 0;
  for (int32_t t = inputs_.query_start[i]; t < inputs_.query_start[i + 1]; ++t) {
    state.past.resize(state.num_tokens, 0);
    state.past.push_back(state.content);
    state.content = Context::extend(state.content, inputs_.token_ids[t]);
    state.newest_len = std::max(state.newest_len, ++state.num_tokens);
    state.has_log = is_decode;
    if (next < end && inputs_.snapshot_positions[next] == state.num_tokens) {
      states_[inputs_.snapshot_slots[next++]] = state;
    }
  }
  expect(next == end, "a snapshot is wanted at a position that the step does not pass");
  states_[inputs_.write_slots[i]] = state;
}

void Device::copy_states(const Plan& plan) {
  const auto* copies = reinterpret_cast<const StateCopy*>(plan.packet + plan.copies_offset);
  for (int32_t i = 0; i < plan.num_copies; ++i) {
    const StateCopy& copy = copies[i];
    expect(copy.src_slot > 0 && copy.dst_slot > 0, "the dummy's state is copied");
    State state = states_[copy.src_slot];
    go_back(state, copy.position, 0);
    // The device may have stopped the row before: then nobody may read the copy.
    if (state.num_tokens < copy.position && copy.src_slot != copy.dst_slot) {
      states_[copy.dst_slot] = {.num_tokens = -1};
      continue;
    }
    expect(state.num_tokens == copy.position, "a copied state has seen other positions");
    state.newest_len = state.num_tokens;
    state.has_log = false;
    states_[copy.dst_slot] = state;
  }
}

// All rows of a step run at once: what one writes, no other may read or write.
void Device::check_slots(const Plan& plan) {
  std::vector<int32_t> writers(config_.num_slots + 1, -1);
  const auto write = [&](int32_t slot, int32_t i) {
    expect(slot > 0 && slot <= config_.num_slots, "a row has no slot");
    if (!fault_.empty()) return;
    expect(writers[slot] == -1, "two rows write one slot");
    writers[slot] = i;
  };
  for (int32_t i = 0; i < plan.num_rows; ++i) {
    if (inputs_.rows[i] == kDummyRow) continue;
    write(inputs_.write_slots[i], i);
    const bool has_snapshots = plan.num_snapshots > 0 && i >= plan.num_decode_rows;
    const int32_t end = has_snapshots ? inputs_.snapshot_starts[i + 1] : 0;
    for (int32_t k = has_snapshots ? inputs_.snapshot_starts[i] : 0; k < end; ++k) write(inputs_.snapshot_slots[k], i);
  }
  for (int32_t i = 0; i < plan.num_rows; ++i) {
    if (inputs_.rows[i] == kDummyRow || inputs_.row_start[i] == 0) continue;
    const int32_t writer = writers[inputs_.read_slots[i]];
    const bool is_own = inputs_.read_slots[i] == inputs_.write_slots[i];
    expect(writer == -1 || (is_own && writer == i), "a row reads a slot that another writes");
  }
}

// Over a window a state goes back to its base, and no further than its log keeps inputs; in place it never does.
void Device::go_back(State& state, int32_t num_tokens, int32_t base) {
  if (num_tokens >= state.num_tokens) return;
  expect(config_.state_window.num_tokens > 0, "a state that is kept in place goes back");
  expect(num_tokens >= base, "a state goes back behind its base");
  expect(num_tokens >= state.newest_len - config_.state_window.max_rewind, "a state goes back behind its log");
  if (!fault_.empty()) return;
  state.content = state.past[num_tokens];
  state.num_tokens = num_tokens;
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
  const uint64_t seed = sampling_[row].seed;
  const Context context =
      config_.num_blocks > 0 ? read_cells(row, kv_len) : Context(seed, states_[mirror_.slot[row]].content);
  if (config_.num_slots > 0) check_state(row, context, kv_len);
  if (sampling_[row].repetition_penalty != 1.0f) check_history(row, context, kv_len);
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
  for (int32_t position = 0; position < num_tokens; ++position) {
    const Cell* held = cell(row, position);
    if (held == nullptr) return context;
    context.append(held->token);
    expect(held->content == context.content(), "a block was overwritten while it was in use");
  }
  return context;
}

// A row with penalties needs all its tokens, those that were not computed too.
void Device::check_history(int32_t row, const Context& context, int32_t num_tokens) {
  Context told(sampling_[row].seed);
  for (int32_t i = 0; i < num_tokens; ++i) told.append(mirror_.history[int64_t{row} * config_.max_model_len + i]);
  expect(told.content() == context.content(), "a row's history is not its sequence");
}

void Device::check_state(int32_t row, const Context& context, int32_t num_tokens) {
  const State& state = states_[mirror_.slot[row]];
  expect(state.num_tokens == num_tokens, "a state has seen other positions than its row");
  expect(state.content == context.content(), "a slot was overwritten before it was read");
}

}  // namespace headway::sim
