#include "core/ledger.h"

#include <algorithm>
#include <string>

#include "core/error.h"
#include "core/packet_writer.h"

namespace headway {
namespace {

const LedgerConfig& validated(const LedgerConfig& config) {
  config.validate();
  return config;
}

}  // namespace

Ledger::Ledger(const LedgerConfig& config, uint8_t* packet_ring, uint8_t* result_ring)
    : config_(validated(config)),
      blocks_(config_, clock_),
      slots_(config_, clock_),
      rows_(config_, clock_, blocks_),
      cache_(config_, clock_, blocks_, slots_, rows_),
      planner_(config_, clock_, rows_, blocks_, cache_, waiting_),
      packets_("packet_ring_address", packet_ring, config_.packet_entry_bytes(), config_.max_in_flight()),
      results_(config_, result_ring),
      records_(config_.max_in_flight()) {
  for (StepRecord& record : records_) {
    record.rows.reserve(config_.max_rows);
    record.requests.reserve(config_.max_rows);
    record.scored.reserve(config_.max_scored_tokens);
  }
}

int64_t Ledger::add(std::span<const int32_t> prompt, const SamplingSpec& spec, int32_t max_new_tokens, int32_t priority,
                    std::string_view salt, bool uses_cache) {
  validate_request(config_, prompt, spec, max_new_tokens);
  auto owned = std::make_unique<Request>();
  fill_request(config_, prompt, spec, max_new_tokens, *owned);
  owned->id = next_id_;
  owned->priority = priority;
  // Ending a request must not allocate.
  if (finished_.capacity() <= requests_.size()) finished_.reserve(2 * requests_.size() + 1);
  Request& request = *requests_.emplace(next_id_, std::move(owned)).first->second;
  try {
    waiting_.push_new(request);
    cache_.open(request, salt, uses_cache && spec.num_prompt_logprobs < 0);
  } catch (...) {
    if (waiting_.contains(request)) waiting_.remove(request);
    requests_.erase(next_id_);
    throw;
  }
  ++num_unfinished_;
  num_guided_ += request.is_guided;
  return next_id_++;
}

std::optional<Plan> Ledger::plan() {
  if (clock_.num_in_flight() == config_.max_in_flight()) return std::nullopt;
  forget_finished();
  const StepDraft& draft = planner_.draft(clock_.launched + 1);
  if (draft.rows.empty()) return std::nullopt;
  remember(draft);
  clock_.launched = draft.step;

  Plan plan;
  plan.step = draft.step;
  plan.num_rows = static_cast<int32_t>(draft.rows.size());
  plan.num_decode_rows = draft.num_decode_rows;
  plan.num_sampled = draft.num_sampled;
  plan.num_tokens = draft.num_tokens;
  plan.max_query_len = draft.max_query_len;
  plan.max_kv_len = draft.max_kv_len;
  plan.num_snapshots = static_cast<int32_t>(draft.snapshots.size());
  plan.num_copies = static_cast<int32_t>(draft.copies.size());
  plan.num_scored = static_cast<int32_t>(draft.scores.size());
  plan.num_admitted = static_cast<int32_t>(draft.admitted.size());
  plan.result = results_.entry(draft.step);
  if (draft.has_news) {
    uint8_t* packet = packets_.entry(draft.step);
    plan.packet_bytes = write_packet(draft, rows_, packet, config_.packet_entry_bytes());
    plan.packet = packet;
    plan.copies_offset = reinterpret_cast<const PacketHeader*>(packet)->copies_offset;
  }
  return plan;
}

std::vector<int64_t> Ledger::admitted_requests() const {
  std::vector<int64_t> ids;
  for (const int32_t row : planner_.last_draft().admitted) {
    if (const Request* request = rows_.request(row)) ids.push_back(request->id);
  }
  return ids;
}

void Ledger::remember(const StepDraft& draft) {
  StepRecord& record = records_[draft.step % config_.max_in_flight()];
  require_integrity(clock_.has_retired(record.step), "I9: a ring entry is used again before its step was committed");
  record.step = draft.step;
  record.num_sampled = draft.num_sampled;
  record.rows.clear();
  for (const StepRow& row : draft.rows) record.rows.push_back(row.row);
  record.requests.assign(draft.requests.begin(), draft.requests.end());
  record.scored.assign(draft.scored.begin(), draft.scored.end());
}

bool Ledger::is_ready() const {
  return clock_.num_in_flight() > 0 && results_.is_published(clock_.retired + 1);
}

bool Ledger::commit(CommitRecord& changes) {
  changes.clear();
  if (!is_ready()) return false;
  const StepRecord& step_record = record(clock_.retired + 1);
  const ResultView results = results_.view(step_record.step);
  require_integrity(results.header->num_sampled == step_record.num_sampled,
                    "the device sampled another number of rows than planned");
  const auto num_scored = static_cast<int32_t>(step_record.scored.size());
  require_integrity(results.header->num_scored == num_scored,
                    "the device scored another number of tokens than planned");
  changes.step = step_record.step;
  changes.num_columns = config_.max_logprobs;
  changes.begin_ns = results.header->begin_ns;
  changes.end_ns = results.header->end_ns;
  // All memory is had before anything changes.
  const auto wants_alternatives = [](const Request* request) { return request->num_logprobs > 0; };
  changes.reserve(step_record.num_sampled, std::ranges::any_of(step_record.requests, wants_alternatives));
  changes.reserve_scores(num_scored);
  for (int32_t i = 0; i < num_scored; ++i) {
    Request& request = *step_record.scored[i];
    if (!request.is_finished()) accept_score(request, results, step_record.num_sampled + i, changes);
  }
  publish(step_record, results);
  for (int32_t i = 0; i < step_record.num_sampled; ++i) {
    Request& request = *step_record.requests[i];
    // Void: it was over, or was rewound, before this step's results came.
    if (request.is_finished() || step_record.step <= request.void_step) continue;
    require_integrity(results.rows[i].row == step_record.rows[i], "the device sampled another row than planned");
    if (request.num_logprobs > 0) report_alternatives(step_record, results, i, changes);
    accept(request, results.rows[i], changes);
  }
  const size_t num_cells = changes.tokens.size() * config_.max_logprobs;
  if (!changes.top_ids.empty()) {
    changes.top_ids.resize(num_cells, -1);
    changes.top_logprobs.resize(num_cells, 0.0f);
  }
  retire(step_record.step);
  return true;
}

void Ledger::accept_score(Request& request, const ResultView& results, int32_t index, CommitRecord& changes) {
  const ResultRow& result = results.rows[index];
  if (result.is_bad > 0) {
    end(request, FinishReason::kError);
    report(request, result, changes);
    return;
  }
  const int64_t num_columns = config_.max_logprobs;
  changes.score_request_ids.push_back(request.id);
  changes.score_tokens.push_back(result.token);
  changes.score_logprobs.push_back(result.logprob);
  changes.score_ranks.push_back(result.rank);
  const int32_t* top_ids = results.top_ids + index * num_columns;
  const float* logprobs = results.top_logprobs + index * num_columns;
  changes.score_top_ids.insert(changes.score_top_ids.end(), top_ids, top_ids + num_columns);
  changes.score_top_logprobs.insert(changes.score_top_logprobs.end(), logprobs, logprobs + num_columns);
}

// Before its results are accepted: a request that ends with this step still holds the row whose blocks are published.
void Ledger::publish(const StepRecord& step_record, const ResultView& results) {
  if (!cache_.is_on()) return;
  for (int32_t i = 0; i < step_record.num_sampled; ++i) {
    Request& request = *step_record.requests[i];
    const bool is_void = request.is_finished() || step_record.step <= request.void_step;
    if (results.rows[i].is_bad != 0 && !is_void) cache_.retract(request);
  }
  cache_.publish(step_record.step);
}

// The host repeats the device's arithmetic; where they differ, one of them is wrong.
void Ledger::accept(Request& request, const ResultRow& result, CommitRecord& changes) {
  if (result.is_bad != 0) {
    end(request, FinishReason::kError);
    report(request, result, changes);
    return;
  }
  require_integrity(result.token >= 0 && result.token < config_.vocab_size, "the device sampled no valid token");
  const FinishReason reason = verdict(request, result.token);
  require_integrity((reason != FinishReason::kNotFinished) == (result.is_stopped != 0),
                    "host and device disagree on whether a row has stopped");
  request.tokens.push_back(result.token);
  ++request.num_delivered;
  if (reason != FinishReason::kNotFinished) {
    // The device has stopped the row by itself: later steps have not touched its state.
    cache_.donate(request, cache_.committed_len(request), true);
    end(request, reason);
  }
  report(request, result, changes);
}

void Ledger::report(const Request& request, const ResultRow& result, CommitRecord& changes) const {
  const bool is_bad = request.finish_reason == FinishReason::kError;
  const bool is_stop = request.finish_reason == FinishReason::kStop;
  changes.request_ids.push_back(request.id);
  changes.tokens.push_back(is_bad ? -1 : result.token);
  changes.finish_reasons.push_back(static_cast<int32_t>(request.finish_reason));
  changes.stop_tokens.push_back(is_stop ? result.token : -1);
  changes.cached_tokens.push_back(request.num_cached_tokens);
  changes.logprobs.push_back(result.logprob);
  changes.ranks.push_back(result.rank);
}

// Rows before it that asked for none are filled up with -1.
void Ledger::report_alternatives(const StepRecord& step_record, const ResultView& results, int32_t index,
                                 CommitRecord& changes) {
  const int64_t num_columns = config_.max_logprobs;
  const int64_t num_wanted = step_record.requests[index]->num_logprobs;
  const size_t num_before = changes.tokens.size() * num_columns;
  changes.top_ids.resize(num_before, -1);
  changes.top_logprobs.resize(num_before, 0.0f);
  const int32_t* ids = results.top_ids + index * num_columns;
  const float* logprobs = results.top_logprobs + index * num_columns;
  changes.top_ids.insert(changes.top_ids.end(), ids, ids + num_wanted);
  changes.top_logprobs.insert(changes.top_logprobs.end(), logprobs, logprobs + num_wanted);
}

void Ledger::retire(int64_t step) {
  clock_.retired = step;
  blocks_.retire(step);
  slots_.retire(step);
  rows_.retire(step);
  cache_.retire(step);
}

// Its memory and its record wait for the last launched step that names it; results until then are void.
void Ledger::end(Request& request, FinishReason reason) {
  if (request.state == RequestState::kWaiting) waiting_.remove(request);
  if (request.state == RequestState::kPaused) --num_paused_;
  if (request.row != kDummyRow) cache_.release(request.row);
  cache_.close(request);
  request.state = RequestState::kFinished;
  request.finish_reason = reason;
  finished_.push_back(&request);
  --num_unfinished_;
  num_guided_ -= request.is_guided;
  ++num_finished_;
}

void Ledger::forget_finished() {
  std::erase_if(finished_, [this](const Request* request) {
    if (!clock_.has_retired(request->last_step)) return false;
    requests_.erase(request->id);
    return true;
  });
}

bool Ledger::abort(int64_t request_id) {
  Request* request = find_unfinished(request_id);
  if (request == nullptr) return false;
  end(*request, FinishReason::kAbort);
  return true;
}

bool Ledger::finish(int64_t request_id, int32_t num_output_tokens) {
  Request* request = find_unfinished(request_id);
  if (request == nullptr) return false;
  if (num_output_tokens < 0 || num_output_tokens > request->num_outputs()) {
    throw RequestError("num_output_tokens", num_output_tokens,
                       "in [0, " + std::to_string(request->num_outputs()) + "]");
  }
  const int32_t num_kept = request->prompt_len + num_output_tokens;
  const int32_t num_computed = std::min(num_kept, cache_.committed_len(*request));
  // Of a row that was launched further the state can go back where a rewind could.
  const bool has_state = request->row != kDummyRow && num_computed + 1 >= rows_.min_rewound_len(request->row);
  cut(*request, num_output_tokens);
  cache_.donate(*request, num_computed, has_state);
  end(*request, FinishReason::kStop);
  return true;
}

void Ledger::cut(Request& request, int32_t num_outputs) {
  request.tokens.resize(request.prompt_len + num_outputs);
  request.num_delivered = num_outputs;
  request.match_version = -1;
}

bool Ledger::rewind(int64_t request_id, int32_t num_positions) {
  Request* request = find_unfinished(request_id);
  if (request == nullptr) return false;
  require_reachable(*request, num_positions);
  const int32_t num_kept = request->num_tokens() - num_positions;
  // Blocks that others may share are not written again: the request goes on from them in a row of its own. So does one
  // whose prompt would lose what its cuts have left for the last chunk.
  if (cache_.is_cached_beyond(*request, num_kept) || planner_.would_end_short(*request, num_kept)) {
    planner_.evict(request->row);
  }
  if (request->row != kDummyRow) rows_.rewind(request->row, num_kept);
  cut(*request, request->num_outputs() - num_positions);
  request->void_step = clock_.launched;
  return true;
}

// A request without a row will be computed anew, and can go back anywhere.
void Ledger::require_reachable(const Request& request, int32_t num_positions) const {
  int32_t most = request.num_outputs();
  if (request.row != kDummyRow && rows_.launched_len(request.row) >= request.num_tokens() - num_positions) {
    most = std::min(most, request.num_tokens() - rows_.min_rewound_len(request.row));
  }
  if (num_positions >= 0 && num_positions <= most) return;
  const std::string limit = most < 0 ? "used while nothing of the request is in flight"
                                     : "in [0, " + std::to_string(most) + "], the outputs that can be computed again";
  throw RequestError("num_positions", num_positions, limit);
}

bool Ledger::set_token_mask(int64_t request_id, int32_t num_tokens, std::span<const uint32_t> mask) {
  Request* request = find_unfinished(request_id);
  if (request == nullptr || !request->is_guided || request->num_tokens() != num_tokens) return false;
  validate_token_mask(config_, mask);
  request->token_mask.assign(mask.begin(), mask.end());
  request->mask_len = num_tokens;
  request->is_mask_sent = false;
  return true;
}

bool Ledger::pause(int64_t request_id) {
  Request* request = find_unfinished(request_id);
  if (request == nullptr || request->state == RequestState::kPaused) return false;
  if (request->row != kDummyRow) {
    rows_.pause(request->row);
  } else {
    waiting_.remove(*request);
    request->state = RequestState::kPaused;
  }
  ++num_paused_;
  return true;
}

bool Ledger::resume(int64_t request_id) {
  Request* request = find_unfinished(request_id);
  if (request == nullptr || request->state != RequestState::kPaused) return false;
  if (request->row != kDummyRow) {
    rows_.resume(request->row);
  } else {
    waiting_.push_back_in(*request);
    request->state = RequestState::kWaiting;
  }
  --num_paused_;
  return true;
}

bool Ledger::evict(int64_t request_id) {
  const Request* request = find_unfinished(request_id);
  if (request == nullptr || request->row == kDummyRow) return false;
  planner_.evict(request->row);
  return true;
}

std::span<const int32_t> Ledger::output_tokens(int64_t request_id) const {
  const Request* request = find(request_id);
  if (request == nullptr) throw RequestError("request_id", request_id, "a request that is known");
  return std::span<const int32_t>(request->tokens).subspan(request->prompt_len);
}

const Request* Ledger::find(int64_t request_id) const {
  const auto found = requests_.find(request_id);
  return found == requests_.end() ? nullptr : found->second.get();
}

Request* Ledger::find_unfinished(int64_t request_id) {
  const auto found = requests_.find(request_id);
  return found == requests_.end() || found->second->is_finished() ? nullptr : found->second.get();
}

Stats Ledger::stats() const {
  Stats stats;
  stats.num_waiting = waiting_.size();
  stats.num_running = static_cast<int64_t>(rows_.running().size());
  stats.num_paused = num_paused_;
  if (num_guided_ > 0) {
    for (const auto& [id, request] : requests_) {
      const bool is_active = request->state == RequestState::kRunning || request->state == RequestState::kWaiting;
      stats.num_held += is_active && request->is_held_at(request->num_tokens());
    }
  }
  stats.blocks_total = config_.num_blocks;
  stats.blocks_free = blocks_.num_free();
  stats.blocks_fenced = blocks_.num_fenced();
  stats.slots_total = config_.num_slots;
  stats.slots_free = slots_.num_free();
  stats.slots_fenced = slots_.num_fenced();
  stats.steps_launched = clock_.launched;
  stats.steps_committed = clock_.retired;
  stats.num_evictions = planner_.num_evictions();
  stats.num_finished = num_finished_;
  stats.num_transfers = cache_.host() != nullptr ? cache_.host()->num_moving() : 0;
  return stats;
}

}  // namespace headway
