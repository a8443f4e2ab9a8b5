#include "tests/sim/client.h"

#include <algorithm>

#include "core/error.h"
#include "tests/check.h"
#include "tests/sim/device.h"

namespace headway::sim {
namespace {

int32_t total_limit(const LedgerConfig& config, const RequestSpec& spec) {
  return std::min(static_cast<int32_t>(spec.prompt.size()) + spec.max_new_tokens, config.max_model_len);
}

// Whether the request could run if it were alone; the last token sampled needs no block.
bool fits_ever(const LedgerConfig& config, const RequestSpec& spec) {
  if (static_cast<int32_t>(spec.prompt.size()) >= config.max_model_len) return false;
  return config.num_blocks == 0 || total_limit(config, spec) - 1 <= config.num_blocks * config.block_size;
}

}  // namespace

int64_t Client::add(const RequestSpec& spec) {
  int64_t id = 0;
  try {
    id = ledger_.add(spec.prompt, spec.sampling, spec.max_new_tokens, spec.priority, salt_of(spec.sampling.seed),
                     spec.uses_cache);
  } catch (const CapacityError&) {
    EXPECT_TRUE(!fits_ever(ledger_.config(), spec));
    return 0;
  }
  EXPECT_TRUE(fits_ever(ledger_.config(), spec));
  EXPECT_EQ(id, newest_id_ + 1);  // what is refused leaves no trace
  newest_id_ = id;
  ++num_unfinished_;
  Conversation& conversation = conversations_[id];
  conversation.spec = spec;
  conversation.max_total_len = total_limit(ledger_.config(), spec);
  conversation.context = Context(spec.sampling.seed);
  for (const int32_t token : spec.prompt) conversation.context.append(token);
  return id;
}

std::vector<int32_t> Client::tokens_of_one(Rng& rng) const {
  constexpr int32_t kNumLast = 8;
  const auto newest = static_cast<int32_t>(newest_id_);
  const auto found = conversations_.find(rng.draw(std::max(1, newest - kNumLast), std::max(1, newest)));
  if (found == conversations_.end()) return {};
  std::vector<int32_t> tokens = found->second.spec.prompt;
  tokens.insert(tokens.end(), found->second.outputs.begin(), found->second.outputs.end());
  return tokens;
}

void Client::receive(const CommitRecord& changes, int32_t num_sampled) {
  const size_t num_results = changes.request_ids.size();
  EXPECT_TRUE(changes.tokens.size() == num_results && changes.finish_reasons.size() == num_results &&
              changes.stop_tokens.size() == num_results && changes.logprobs.size() == num_results &&
              changes.cached_tokens.size() == num_results && changes.ranks.size() == num_results);
  tally_.num_void_results += num_sampled - static_cast<int64_t>(num_results);
  for (size_t i = 0; i < num_results; ++i) receive_one(changes, i);
}

void Client::receive_one(const CommitRecord& changes, size_t i) {
  Conversation* conversation = find(changes.request_ids[i]);
  EXPECT_TRUE(conversation != nullptr);
  EXPECT_TRUE(!conversation->is_over());
  const auto reason = static_cast<FinishReason>(changes.finish_reasons[i]);
  const int32_t token = changes.tokens[i];
  if (conversation->context.is_bad()) {
    EXPECT_TRUE(reason == FinishReason::kError && token == -1);
    end(*conversation, reason);
    return;
  }
  EXPECT_EQ(token, conversation->context.next_token(ledger_.config().vocab_size));
  EXPECT_TRUE(reason == expected_end(*conversation, token));
  EXPECT_EQ(changes.stop_tokens[i], reason == FinishReason::kStop ? token : -1);
  EXPECT_EQ(changes.logprobs[i], logprob_of(token));
  EXPECT_EQ(changes.ranks[i], rank_of(token));
  const int32_t num_cached = changes.cached_tokens[i];
  const auto prompt_len = static_cast<int32_t>(conversation->spec.prompt.size());
  EXPECT_TRUE(num_cached >= 0 && num_cached < prompt_len && (num_cached == 0 || conversation->spec.uses_cache));
  check_alternatives(changes, i, conversation->spec.sampling.num_logprobs);
  conversation->context.append(token);
  conversation->outputs.push_back(token);
  ++tally_.num_tokens;
  if (reason != FinishReason::kNotFinished) {
    end(*conversation, reason);
  } else if (conversation->context.ends_stop_string()) {
    const auto num_outputs = static_cast<int32_t>(conversation->outputs.size());
    finish(changes.request_ids[i], num_outputs - conversation->context.num_cut_tokens());
  }
}

// The rule of step_layout.h, stated once more.
FinishReason Client::expected_end(const Conversation& conversation, int32_t token) const {
  const SamplingSpec& sampling = conversation.spec.sampling;
  const auto num_outputs = static_cast<int32_t>(conversation.outputs.size());
  const bool is_stop = std::find(sampling.stop_ids.begin(), sampling.stop_ids.end(), token) != sampling.stop_ids.end();
  if (is_stop && num_outputs >= sampling.min_tokens) return FinishReason::kStop;
  const auto total_len = static_cast<int32_t>(conversation.spec.prompt.size()) + num_outputs + 1;
  return total_len >= conversation.max_total_len ? FinishReason::kLength : FinishReason::kNotFinished;
}

void Client::check_alternatives(const CommitRecord& changes, size_t i, int32_t num_wanted) const {
  const int32_t num_columns = changes.num_columns;
  for (int32_t k = 0; k < num_columns && num_wanted > 0; ++k) {
    const int32_t token = changes.tokens[i];
    const int32_t expected = k < num_wanted ? alternative(token, k, ledger_.config().vocab_size) : -1;
    EXPECT_EQ(changes.top_ids.at(i * num_columns + k), expected);
    const float logprob = logprob_of(token) - static_cast<float>(k);
    EXPECT_TRUE(k >= num_wanted || changes.top_logprobs.at(i * num_columns + k) == logprob);
  }
}

bool Client::abort(int64_t id) {
  const bool was_aborted = ledger_.abort(id);
  Conversation* conversation = find(id);
  EXPECT_EQ(was_aborted, conversation != nullptr && !conversation->is_over());
  if (was_aborted) end(*conversation, FinishReason::kAbort);
  return was_aborted;
}

bool Client::finish(int64_t id, int32_t num_kept) {
  const bool was_finished = ledger_.finish(id, num_kept);
  Conversation* conversation = find(id);
  EXPECT_EQ(was_finished, conversation != nullptr && !conversation->is_over());
  if (!was_finished) return false;
  conversation->outputs.resize(num_kept);
  ++tally_.num_host_stops;
  end(*conversation, FinishReason::kStop);
  return true;
}

bool Client::rewind(int64_t id, int32_t num_positions) {
  Conversation* conversation = find(id);
  const bool is_open = conversation != nullptr && !conversation->is_over();
  try {
    EXPECT_EQ(ledger_.rewind(id, num_positions), is_open);
  } catch (const RequestError&) {
    EXPECT_TRUE(is_open && may_refuse(*conversation, num_positions));
    ++tally_.num_refused_rewinds;
    return false;
  }
  if (!is_open) return false;
  std::vector<int32_t>& outputs = conversation->outputs;
  EXPECT_TRUE(num_positions >= 0 && static_cast<size_t>(num_positions) <= outputs.size());
  outputs.resize(outputs.size() - num_positions);
  conversation->context = Context(conversation->spec.sampling.seed);
  for (const int32_t token : conversation->spec.prompt) conversation->context.append(token);
  for (const int32_t token : outputs) conversation->context.append(token);
  ++tally_.num_rewinds;
  return true;
}

// States kept in place cannot go back, and what the prompt sampled first is not sampled again.
bool Client::may_refuse(const Conversation& conversation, int32_t num_positions) const {
  const auto num_outputs = static_cast<int32_t>(conversation.outputs.size());
  return num_positions < 0 || num_positions >= num_outputs || ledger_.config().num_slots > 0;
}

void Client::check_outputs(int64_t id) const {
  const auto found = conversations_.find(id);
  if (found == conversations_.end()) return;
  const Request* request = ledger_.find(id);
  EXPECT_TRUE(request != nullptr || found->second.is_over());
  if (request == nullptr) return;
  const auto outputs = ledger_.output_tokens(id);
  EXPECT_TRUE(std::equal(outputs.begin(), outputs.end(), found->second.outputs.begin(), found->second.outputs.end()));
  EXPECT_TRUE(request->finish_reason == found->second.reason);
}

Conversation* Client::find(int64_t id) {
  const auto found = conversations_.find(id);
  return found == conversations_.end() ? nullptr : &found->second;
}

void Client::end(Conversation& conversation, FinishReason reason) {
  conversation.reason = reason;
  conversation.is_paused = false;
  --num_unfinished_;
  ++tally_.num_by_reason[static_cast<int32_t>(reason)];
}

}  // namespace headway::sim
