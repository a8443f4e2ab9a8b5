#include "core/request.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/error.h"

namespace headway {
namespace {

std::string range(int64_t low, int64_t past_high) {
  return "in [" + std::to_string(low) + ", " + std::to_string(past_high) + ")";
}

void require_at_most(const char* parameter, int64_t value, int64_t limit) {
  if (value > limit) throw RequestError(parameter, value, "at most " + std::to_string(limit));
}

void require_token(const char* parameter, int32_t token, int32_t vocab_size) {
  if (token < 0 || token >= vocab_size) throw RequestError(parameter, token, range(0, vocab_size));
}

int32_t total_limit(const LedgerConfig& config, int64_t prompt_len, int32_t max_new_tokens) {
  return static_cast<int32_t>(std::min<int64_t>(prompt_len + max_new_tokens, config.max_model_len));
}

void validate_sampling(const LedgerConfig& config, const SamplingSpec& spec, int32_t max_new_tokens) {
  if (spec.min_tokens < 0) throw RequestError("min_tokens", spec.min_tokens, "at least 0");
  require_at_most("min_tokens", spec.min_tokens, max_new_tokens);
  if (spec.num_logprobs < -1) throw RequestError("num_logprobs", spec.num_logprobs, "at least -1");
  require_at_most("num_logprobs", spec.num_logprobs, config.max_logprobs);
  require_at_most("len(stop_ids)", static_cast<int64_t>(spec.stop_ids.size()), kMaxStopIds);
  for (const int32_t token : spec.stop_ids) require_token("stop_ids", token, config.vocab_size);
  require_at_most("len(logit_bias)", static_cast<int64_t>(spec.logit_bias.size()), kMaxLogitBias);
  for (const auto& [token, bias] : spec.logit_bias) {
    require_token("logit_bias", token, config.vocab_size);
    if (std::isnan(bias)) throw RequestError("logit_bias", token, "a token whose bias is a number");
  }
}

void validate_choice(const LedgerConfig& config, const SamplingSpec& spec) {
  if (spec.num_prompt_logprobs < -1) throw RequestError("num_prompt_logprobs", spec.num_prompt_logprobs, "at least -1");
  if (spec.num_prompt_logprobs >= 0 && config.max_scored_tokens == 0) {
    throw RequestError("num_prompt_logprobs", spec.num_prompt_logprobs, "-1, since max_scored_tokens is 0");
  }
  require_at_most("num_prompt_logprobs", spec.num_prompt_logprobs, config.max_logprobs);
  size_t num_entries = spec.bad_words.size();
  for (const auto& word : spec.bad_words) {
    if (word.empty()) throw RequestError("len(bad_words)", 0, "at least 1 for each");
    for (const int32_t token : word) require_token("bad_words", token, config.vocab_size);
    num_entries += word.size();
  }
  require_at_most("len(bad_words) and their tokens", static_cast<int64_t>(num_entries), kMaxBadWordEntries);
  if (!spec.token_mask.empty()) validate_token_mask(config, spec.token_mask);
}

// The last token is sampled but never computed, so it needs no block.
void validate_capacity(const LedgerConfig& config, int64_t prompt_len, int32_t max_new_tokens) {
  if (prompt_len >= config.max_model_len) {
    throw CapacityError("len(prompt)", prompt_len, "less than max_model_len = " + std::to_string(config.max_model_len),
                        "shorten the prompt or raise max_model_len");
  }
  const int32_t total = total_limit(config, prompt_len, max_new_tokens);
  const int32_t num_needed = config.blocks_for(total - 1);
  if (num_needed <= config.num_blocks) return;
  const int64_t most = int64_t{config.num_blocks} * config.block_size + 1;
  throw CapacityError("len(prompt) + max_new_tokens", total,
                      "at most " + std::to_string(most) +
                          ", the tokens that num_blocks = " + std::to_string(config.num_blocks) + " hold",
                      "raise num_blocks to " + std::to_string(num_needed) + " or lower max_new_tokens");
}

std::vector<int32_t> bad_word_entries(const std::vector<std::vector<int32_t>>& words) {
  std::vector<int32_t> entries;
  int32_t end = 0;
  for (const auto& word : words) entries.push_back(end += static_cast<int32_t>(word.size()));
  for (const auto& word : words) entries.insert(entries.end(), word.begin(), word.end());
  return entries;
}

int32_t sampling_flags(const SamplingSpec& spec) {
  const bool has_mask = spec.is_guided || !spec.token_mask.empty();
  return (has_mask ? kHasTokenMask : 0) | (spec.has_processed_logprobs ? kProcessedLogprobs : 0);
}

}  // namespace

void validate_token_mask(const LedgerConfig& config, std::span<const uint32_t> mask) {
  const auto num_words = static_cast<int64_t>(mask.size());
  if (num_words != config.mask_words()) {
    throw RequestError("len(token_mask)", num_words, std::to_string(config.mask_words()) + " words");
  }
  const int32_t num_last = config.vocab_size % 32;
  const uint32_t last = num_last == 0 ? mask.back() : mask.back() & ((1u << num_last) - 1);
  const bool is_empty = last == 0 && std::all_of(mask.begin(), mask.end() - 1, [](uint32_t word) { return word == 0; });
  if (is_empty) throw RequestError("token_mask", 0, "a mask that allows at least one token");
}

void validate_request(const LedgerConfig& config, std::span<const int32_t> prompt, const SamplingSpec& spec,
                      int32_t max_new_tokens) {
  if (prompt.empty()) throw RequestError("len(prompt)", 0, "at least 1");
  if (max_new_tokens < 1) throw RequestError("max_new_tokens", max_new_tokens, "at least 1");
  validate_sampling(config, spec, max_new_tokens);
  validate_choice(config, spec);
  validate_capacity(config, static_cast<int64_t>(prompt.size()), max_new_tokens);
  for (const int32_t token : prompt) require_token("prompt", token, config.vocab_size);
}

void fill_request(const LedgerConfig& config, std::span<const int32_t> prompt, const SamplingSpec& spec,
                  int32_t max_new_tokens, Request& request) {
  request.prompt_len = static_cast<int32_t>(prompt.size());
  request.max_total_len = total_limit(config, request.prompt_len, max_new_tokens);
  request.tokens.reserve(request.max_total_len);
  request.tokens.assign(prompt.begin(), prompt.end());
  request.min_total_len = request.prompt_len + spec.min_tokens;
  request.num_logprobs = spec.num_logprobs;
  request.stop_ids = spec.stop_ids;
  request.logit_bias = spec.logit_bias;
  request.bad_words = bad_word_entries(spec.bad_words);
  request.token_mask = spec.token_mask;
  request.is_guided = spec.is_guided;
  if (spec.is_guided) request.token_mask.resize(config.mask_words());
  request.num_prompt_logprobs = spec.num_prompt_logprobs;
  request.sampling = RowSampling{
      .seed = spec.seed,
      .temperature = spec.temperature,
      .top_p = spec.top_p,
      .min_p = spec.min_p,
      .top_k = spec.top_k,
      .repetition_penalty = spec.repetition_penalty,
      .presence_penalty = spec.presence_penalty,
      .frequency_penalty = spec.frequency_penalty,
      .prompt_len = request.prompt_len,
      .min_total_len = request.min_total_len,
      .max_total_len = request.max_total_len,
      .num_stop_ids = static_cast<int32_t>(spec.stop_ids.size()),
      .num_logit_bias = static_cast<int32_t>(spec.logit_bias.size()),
      .num_logprobs = spec.num_logprobs,
      .num_prompt_logprobs = spec.num_prompt_logprobs,
      .num_bad_words = static_cast<int32_t>(spec.bad_words.size()),
      .num_bad_word_tokens = static_cast<int32_t>(request.bad_words.size() - spec.bad_words.size()),
      .flags = sampling_flags(spec),
      .reserved = 0,
  };
}

FinishReason verdict(const Request& request, int32_t token) {
  const int32_t kv_len = request.num_tokens();
  const auto& stops = request.stop_ids;
  if (kv_len >= request.min_total_len && std::find(stops.begin(), stops.end(), token) != stops.end()) {
    return FinishReason::kStop;
  }
  return kv_len + 1 >= request.max_total_len ? FinishReason::kLength : FinishReason::kNotFinished;
}

}  // namespace headway
