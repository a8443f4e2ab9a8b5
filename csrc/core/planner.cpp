#include "core/planner.h"

#include <algorithm>
#include <span>

namespace headway {
namespace {

constexpr int32_t kMaxPassed = 16;  // requests that may wait for a running prompt while later ones are admitted

// Whether a row may be evicted for `needy`: it must not run before it. Among equals a paused row gives way to any.
bool gives_way_to(const Request& victim, const Request& needy) {
  if (victim.priority != needy.priority) return victim.priority > needy.priority;
  return victim.state == RequestState::kPaused || RunsBefore{}(&needy, &victim);
}

// Who is evicted first: higher priority value, then paused, then younger.
bool is_evicted_before(const Request& a, const Request& b) {
  if (a.priority != b.priority) return a.priority > b.priority;
  if (a.state != b.state) return a.state == RequestState::kPaused;
  return RunsBefore{}(&b, &a);
}

}  // namespace

void StepDraft::clear(int64_t new_step) {
  step = new_step;
  rows.clear();
  requests.clear();
  admitted.clear();
  grants.clear();
  snapshots.clear();
  copies.clear();
  rewinds.clear();
  masks.clear();
  scores.clear();
  scored.clear();
  num_decode_rows = num_sampled = num_tokens = num_words = num_prompt_tokens = max_query_len = max_kv_len = 0;
  num_shared_blocks = num_history = 0;
  has_news = false;
}

Planner::Planner(const LedgerConfig& config, const StepClock& clock, RowTable& rows, BlockPool& blocks,
                 PrefixCache& cache, WaitingQueue& waiting)
    : config_(config), clock_(clock), rows_(rows), blocks_(blocks), cache_(cache), waiting_(waiting) {
  draft_.rows.reserve(config.max_rows);
  draft_.requests.reserve(config.max_rows);
  draft_.admitted.reserve(config.max_rows);
  draft_.grants.reserve(config.max_packet_grants());
  draft_.snapshots.reserve(config.max_packet_snapshots());
  draft_.copies.reserve(config.max_packet_copies());
  draft_.rewinds.reserve(config.max_rows);
  draft_.masks.reserve(config.max_packet_masks());
  draft_.scores.reserve(config.max_scored_tokens);
  draft_.scored.reserve(config.max_scored_tokens);
  final_chunks_.reserve(config.max_rows);
  other_chunks_.reserve(config.max_rows);
  device_rows_.reserve(config.max_rows);
}

const StepDraft& Planner::draft(int64_t step) {
  draft_.clear(step);
  num_scores_ = 0;
  draft_.rewinds = rows_.rewinds();
  cache_.save_ahead();
  plan_decodes();
  plan_prompts();
  admit_waiting();
  order_rows();
  drop_stale_rewinds();
  if (!draft_.rows.empty()) cache_.note_step(draft_, waiting_);
  draft_.has_news = !draft_.grants.empty() || !draft_.copies.empty() || !draft_.rewinds.empty() ||
                    !draft_.masks.empty() || !repeats_device_rows();
  if (draft_.has_news && !draft_.rows.empty()) {
    grant_ahead();
    rows_.clear_rewinds();
    device_rows_.clear();
    for (const StepRow& row : draft_.rows) device_rows_.push_back(row.row);
  }
  return draft_;
}

// Rows evicted on the way come after the row they give way to, so the list shrinks only behind i.
void Planner::plan_decodes() {
  for (size_t i = 0; i < rows_.running().size() && tokens_left() > 0; ++i) {
    const int32_t row = rows_.running()[i];
    if (!rows_.is_decoding(row) || rows_.is_exhausted(row)) continue;
    if (is_held(row)) continue;
    if (secure(row, 1, 1) == 0) continue;
    bring_mask(row);
    const int32_t start = rows_.launched_len(row);
    draft_.rows.push_back({row, start, 1, -1, rows_.slot(row), 0});
    draft_.requests.push_back(rows_.request(row));
    draft_.max_kv_len = std::max(draft_.max_kv_len, start + 1);
    ++draft_.num_tokens;
    rows_.advance(row, draft_.step, 1, true);
  }
  draft_.num_decode_rows = static_cast<int32_t>(draft_.rows.size());
  draft_.max_query_len = draft_.num_decode_rows > 0;
}

void Planner::plan_prompts() {
  promised_blocks_ = 0;
  held_prompt_ = nullptr;
  for (size_t i = 0; i < rows_.running().size(); ++i) {
    const int32_t row = rows_.running()[i];
    if (rows_.is_decoding(row)) continue;
    const bool is_skipped = tokens_left() > 0 && !add_chunk(row) && !is_held(row);
    if (is_skipped && held_prompt_ == nullptr) held_prompt_ = rows_.request(row);
    promised_blocks_ += blocks_to_finish_prompt(row);
  }
}

// First come, first served: a head that does not fit, or a running prompt that found no room in this step, holds back
// those behind it, so none of them can starve it. Who lacks a token mask, or waits for what a running prompt is about
// to leave in the cache, or for what comes back from host memory, holds back nobody.
void Planner::admit_waiting() {
  int32_t num_passed = 0;
  const WaitingSet& waiting = waiting_.requests();
  for (auto next = waiting.begin(); next != waiting.end() && tokens_left() > 0 && num_passed < kMaxPassed;) {
    Request& request = **next++;
    if (request.is_held_at(request.num_tokens())) continue;
    if (held_prompt_ != nullptr && RunsBefore{}(held_prompt_, &request)) return;
    if (!rows_.has_room() && draft_.num_tokens > 0) return;
    const PrefixMatch& match = cache_.find(request);
    const bool is_passed = cache_.awaits_prefix(request, match);
    num_passed += is_passed;
    if (is_passed) continue;
    const int32_t num_wanted = limit_to_scores(request, match.start, tokens_left());
    if (cut_chunk(match.start, num_wanted, request.num_tokens() - match.start) == 0) return;
    if (!fits(request) && !displace_for(request)) return;
    if (cache_.load(request)) {
      ++num_passed;
    } else {
      admit(request);
    }
  }
}

void Planner::admit(Request& request) {
  waiting_.remove(request);
  const int32_t row = cache_.admit(request, draft_);
  draft_.admitted.push_back(row);
  draft_.num_words += request.num_words();
  add_chunk(row);
  promised_blocks_ += blocks_to_finish_prompt(row);
}

// As much of the prompt as the step's tokens and the free blocks allow; false: nothing of it.
bool Planner::add_chunk(int32_t row) {
  const int32_t start = rows_.launched_len(row);
  const int32_t num_left = rows_.bound_len(row) - start;
  Request& request = *rows_.request(row);
  const int32_t num_wanted = cut_chunk(start, limit_to_scores(request, start, tokens_left()), num_left);
  if (num_wanted == 0 || (num_wanted == num_left && is_held(row))) return false;
  const int32_t num_secured = secure(row, num_wanted, least_chunk(start, num_left));
  if (num_secured == 0) return false;
  const int32_t num_tokens = cut_chunk(start, num_secured, num_left);
  const bool is_final = num_tokens == num_left;
  if (is_final) bring_mask(row);
  const int32_t num_scored = num_scored_in(request, start, num_tokens);
  (is_final ? final_chunks_ : other_chunks_)
      .push_back({{row, start, num_tokens, 0, cache_.read_slot(row, start), cache_.num_history(row, start)},
                  &request,
                  request.num_scored,
                  num_scored});
  num_scores_ += num_scored;
  request.num_scored += num_scored;
  draft_.num_tokens += num_tokens;
  draft_.max_query_len = std::max(draft_.max_query_len, num_tokens);
  draft_.max_kv_len = std::max(draft_.max_kv_len, start + num_tokens);
  rows_.advance(row, draft_.step, num_tokens, is_final);
  return true;
}

// Of num_left tokens from `start`, num_tokens can run: all that is left, or those up to the last point of the grid
// behind which enough is left.
int32_t Planner::cut_chunk(int32_t start, int32_t num_tokens, int32_t num_left) const {
  if (num_tokens >= num_left) return num_left;
  const int32_t grid = config_.prompt_grid_tokens;
  int32_t end = (start + num_tokens) / grid * grid;
  if (start + num_left - end < config_.min_last_chunk_tokens) end -= grid;
  return std::max(0, end - start);
}

// The fewest of num_left tokens from `start` that cut_chunk lets run.
int32_t Planner::least_chunk(int32_t start, int32_t num_left) const {
  const int32_t num_to_grid = config_.prompt_grid_tokens - start % config_.prompt_grid_tokens;
  return num_left - num_to_grid < config_.min_last_chunk_tokens ? num_left : num_to_grid;
}

bool Planner::would_end_short(const Request& request, int32_t num_tokens) const {
  if (request.row == kDummyRow || num_tokens == rows_.bound_len(request.row)) return false;
  const int32_t num_launched = rows_.launched_len(request.row);
  return num_launched > 0 && num_tokens > num_launched && num_tokens - num_launched < config_.min_last_chunk_tokens;
}

// Whether the row cannot sample in this step: what it may sample is not known yet, or does not fit the packet.
bool Planner::is_held(int32_t row) const {
  if (!rows_.has_mask(row)) return false;
  const Request& request = *rows_.request(row);
  if (request.is_held_at(rows_.bound_len(row))) return true;
  return !request.is_mask_sent && std::ssize(draft_.masks) == config_.max_packet_masks();
}

void Planner::bring_mask(int32_t row) {
  if (!rows_.has_mask(row)) return;
  Request& request = *rows_.request(row);
  if (request.is_mask_sent) return;
  draft_.masks.push_back({row, &request});
  request.is_mask_sent = true;
}

// Of these tokens, those whose logits say how likely the prompt's next token was, and were not asked before.
int32_t Planner::num_scored_in(const Request& request, int32_t start, int32_t num_tokens) const {
  if (request.num_prompt_logprobs < 0) return 0;
  const int32_t end = std::min(start + num_tokens, request.prompt_len - 1);
  return std::max(0, end - std::max(start, request.num_scored));
}

// As many of these tokens as the step has room to score.
int32_t Planner::limit_to_scores(const Request& request, int32_t start, int32_t num_tokens) const {
  const int32_t num_spare = config_.max_scored_tokens - num_scores_;
  if (num_scored_in(request, start, num_tokens) <= num_spare) return num_tokens;
  return std::max(start, request.num_scored) + num_spare - start;
}

void Planner::add_scores(const Chunk& chunk, int32_t token_begin) {
  for (int32_t i = 0; i < chunk.num_scored; ++i) {
    const int32_t position = chunk.first_scored + i;
    const int32_t target = chunk.request->tokens[position + 1];
    draft_.scores.push_back({token_begin + position - chunk.row.start, chunk.row.row, target, 0});
    draft_.scored.push_back(chunk.request);
  }
}

// Rows that sample come first, so that they are a prefix.
void Planner::order_rows() {
  int32_t token_begin = draft_.num_decode_rows;
  const auto append = [&](std::vector<Chunk>& chunks) {
    for (Chunk& chunk : chunks) {
      chunk.row.prompt_begin = draft_.num_prompt_tokens + chunk.row.num_history;
      draft_.num_prompt_tokens = chunk.row.prompt_begin + chunk.row.num_tokens;
      draft_.rows.push_back(chunk.row);
      draft_.requests.push_back(chunk.request);
      add_scores(chunk, token_begin);
      token_begin += chunk.row.num_tokens;
    }
    chunks.clear();
  };
  append(final_chunks_);
  draft_.num_sampled = static_cast<int32_t>(draft_.rows.size());
  append(other_chunks_);
}

// Those of rows that were given up on the way, unless the row decodes in this step all the same: it was planned before
// it gave way, and its token counts.
void Planner::drop_stale_rewinds() {
  const auto decodes = std::span(draft_.rows).first(draft_.num_decode_rows);
  std::erase_if(draft_.rewinds, [&](const RowRewind& rewind) {
    const auto is_its_row = [&](const auto& other) { return other.row == rewind.row; };
    return std::ranges::none_of(rows_.rewinds(), is_its_row) && std::ranges::none_of(decodes, is_its_row);
  });
}

bool Planner::repeats_device_rows() const {
  const auto is_same = [](const StepRow& planned, int32_t row) { return planned.row == row; };
  return draft_.num_decode_rows == static_cast<int32_t>(draft_.rows.size()) &&
         std::equal(draft_.rows.begin(), draft_.rows.end(), device_rows_.begin(), device_rows_.end(), is_same);
}

// A packet is sent anyway, so every row that will decode is topped up with it: the next packets for want of a block
// fall together instead of one row a step. Stops while each running row can still get the block it must have.
void Planner::grant_ahead() {
  const auto num_reserved = static_cast<int32_t>(rows_.running().size());
  for (int32_t i = 0; i < draft_.num_sampled; ++i) {
    const int32_t row = draft_.rows[i].row;
    const Request* request = rows_.request(row);
    if (request == nullptr) continue;  // evicted while this step was planned
    const int64_t ahead = int64_t{rows_.launched_len(row)} + int64_t{config_.grant_ahead_blocks} * config_.block_size;
    const auto wanted = static_cast<int32_t>(std::min<int64_t>(ahead, request->max_total_len - 1));
    while (rows_.capacity(row) < wanted && num_available_blocks() > num_reserved + promised_blocks_) {
      grant_up_to(row, rows_.capacity(row) + 1);
    }
  }
}

// Memory for the row's next tokens: as many as can be had of num_tokens, but min_tokens at least, or 0: the row must
// skip the step. Grants nothing then, because a grant reaches the device only with a step.
int32_t Planner::secure(int32_t row, int32_t num_tokens, int32_t min_tokens) {
  const int32_t start = rows_.launched_len(row);
  while (!can_hold(row, start + min_tokens)) {
    if (!make_room(*rows_.request(row))) return 0;
  }
  grant_up_to(row, start + num_tokens);
  return std::min(num_tokens, rows_.capacity(row) - start);
}

// Whether the row's blocks and the free ones are enough.
bool Planner::can_hold(int32_t row, int32_t num_tokens) const {
  if (rows_.capacity(row) >= num_tokens) return true;
  return config_.blocks_for(num_tokens) - static_cast<int32_t>(rows_.blocks(row).size()) <= num_available_blocks();
}

void Planner::grant_up_to(int32_t row, int32_t num_tokens) {
  while (rows_.capacity(row) < num_tokens && num_available_blocks() > 0) {
    cache_.free_block();
    rows_.grant(row);
    const auto& table = rows_.blocks(row);
    draft_.grants.push_back({row, static_cast<int32_t>(table.size()) - 1, table.back()});
  }
}

// True when memory was given up: a block is free now, or is coming, or the next call gives up more, since all that it
// was may be shared. While any is coming, nobody is evicted.
bool Planner::make_room(const Request& needy) {
  if (is_any_block_coming()) return false;
  if (cache_.drop_duplicates()) return true;
  const int32_t victim = pick_victim(needy);
  if (victim == kDummyRow) return false;
  evict(victim);
  return true;
}

// Fenced blocks, cached ones that a launched step names, and those of rows whose last sample is in flight.
bool Planner::is_any_block_coming() const {
  const auto is_exhausted = [this](int32_t row) { return rows_.is_exhausted(row); };
  return blocks_.num_fenced() > 0 || cache_.is_any_block_coming() || std::ranges::any_of(rows_.running(), is_exhausted);
}

int32_t Planner::pick_victim(const Request& needy) const {
  int32_t victim = kDummyRow;
  const auto consider = [&](int32_t row) {
    const Request& request = *rows_.request(row);
    if (!gives_way_to(request, needy)) return;
    if (victim == kDummyRow || is_evicted_before(request, *rows_.request(victim))) victim = row;
  };
  for (const int32_t row : rows_.paused()) consider(row);
  if (!rows_.running().empty()) consider(rows_.running().back());
  return victim;
}

void Planner::evict(int32_t row) {
  Request& request = *rows_.request(row);
  cache_.release(row);
  ++request.num_evictions;
  ++num_evictions_;
  if (request.state == RequestState::kPaused) return;
  request.state = RequestState::kWaiting;
  waiting_.push_back_in(request);
}

// A request is admitted when its whole prompt fits. (While tokens are left for it, every running prompt before it has
// been served.) One that was evicted also leaves each running row a block, or it would soon be evicted again.
bool Planner::fits(Request& request) {
  if (!clock_.has_retired(request.last_step) || !rows_.has_room()) return false;
  const PrefixMatch& match = cache_.find(request);
  if (!cache_.has_slot(match, draft_.step) || !cache_.has_packet_room(request, match, draft_)) return false;
  if (draft_.num_words + request.num_words() > config_.max_packet_words()) return false;
  if (!request.token_mask.empty() && std::ssize(draft_.masks) == config_.max_packet_masks()) return false;
  const int32_t num_spare = request.num_evictions > 0 ? static_cast<int32_t>(rows_.running().size()) : 0;
  const int32_t num_needed = cache_.num_blocks_to_admit(request, match) + num_spare;
  return config_.num_blocks == 0 || num_needed <= num_available_blocks();
}

// When nothing runs and nothing is coming, rows that cannot run (paused ones, or stalled behind them) give way.
bool Planner::displace_for(Request& request) {
  while (draft_.num_tokens == 0 && clock_.num_in_flight() == 0 && !cache_.is_any_block_coming()) {
    const int32_t victim = pick_victim(request);
    if (victim == kDummyRow) return false;
    evict(victim);
    if (fits(request)) return true;
  }
  return false;
}

int32_t Planner::blocks_to_finish_prompt(int32_t row) const {
  if (rows_.is_decoding(row)) return 0;
  return std::max(0, config_.blocks_for(rows_.bound_len(row)) - static_cast<int32_t>(rows_.blocks(row).size()));
}

}  // namespace headway
