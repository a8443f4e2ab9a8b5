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

}  // namespace

void validate_request(const LedgerConfig& config, std::span<const int32_t> prompt, const SamplingSpec& spec,
                      int32_t max_new_tokens) {
  if (prompt.empty()) throw RequestError("len(prompt)", 0, "at least 1");
  if (max_new_tokens < 1) throw RequestError("max_new_tokens", max_new_tokens, "at least 1");
  validate_sampling(config, spec, max_new_tokens);
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
      .reserved = {0, 0},
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
