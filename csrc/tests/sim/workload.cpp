#include "tests/sim/workload.h"

#include <algorithm>

#include "tests/sim/device.h"
#include "tests/sim/language.h"

namespace headway::sim {
namespace {

constexpr int32_t kVocabSize = 40;
constexpr int32_t kMaxBlocks = 64;
constexpr int32_t kMaxModelLen = 48;

}  // namespace

LedgerConfig random_config(Rng& rng) {
  LedgerConfig config;
  const int32_t kind = rng.draw(0, 4);  // 0: attention, 1: Mamba, else both
  config.max_rows = rng.draw(1, 6);
  config.block_size = rng.one_in(8) ? rng.draw(8, 17) : rng.draw(1, 7);
  config.max_model_len = rng.draw(2, kMaxModelLen);
  const int32_t num_blocks_of_longest = (config.max_model_len + config.block_size - 1) / config.block_size;
  // Mostly barely enough for one long sequence, so that requests are in each other's way.
  const int32_t num_tight = num_blocks_of_longest + rng.draw(-2, 3);
  config.num_blocks = std::clamp(rng.one_in(3) ? rng.draw(1, kMaxBlocks) : num_tight, 1, kMaxBlocks);
  config.num_slots = rng.draw(1, 6);
  if (kind == 0) config.num_slots = 0;
  if (kind == 1) config.num_blocks = 0;
  config.max_step_tokens = rng.one_in(3) ? rng.draw(1, 6) : rng.draw(4, 40);
  config.vocab_size = kVocabSize;
  config.max_logprobs = rng.one_in(2) ? 0 : rng.draw(1, 3);
  config.max_launch_depth = rng.draw(0, 3);
  config.grant_ahead_blocks = rng.draw(0, 2);
  config.prompt_grid_tokens = rng.one_in(2) ? 1 : rng.draw(1, config.max_step_tokens);
  const int32_t num_spare = std::min(config.prompt_grid_tokens, config.max_step_tokens - config.prompt_grid_tokens + 1);
  if (!rng.one_in(3)) config.min_last_chunk_tokens = rng.one_in(2) ? num_spare : rng.draw(1, num_spare);
  if (rng.one_in(2)) config.state_window = {.num_tokens = rng.draw(1, 8), .max_rewind = rng.draw(1, 6)};
  config.use_prefix_cache = !rng.one_in(4);
  if (!config.use_prefix_cache) return config;
  if (config.num_slots > 0) config.num_slots += rng.draw(0, 6);
  config.max_snapshots = config.num_slots - (rng.one_in(2) ? 0 : rng.draw(0, config.num_slots));
  config.max_waypoints = rng.draw(0, config.max_snapshots);
  config.snapshot_stride_tokens = rng.one_in(2) ? 0 : rng.draw(1, 16);
  config.decode_snapshot_stride_tokens = rng.one_in(3) ? 0 : rng.draw(1, 6);
  config.weighs_snapshot_cost = rng.one_in(2);
  config.caches_outputs = !rng.one_in(4);
  if (rng.one_in(4)) return config;
  config.num_host_blocks = config.num_blocks > 0 ? rng.draw(1, kMaxBlocks) : 0;
  config.num_host_slots = config.num_slots > 0 ? rng.draw(1, 8) : 0;
  return config;
}

RequestSpec random_request(Rng& rng, const LedgerConfig& config, uint64_t number) {
  RequestSpec request;
  const int32_t prompt_len = rng.one_in(4) ? rng.draw(1, config.max_model_len) : rng.draw(1, 16);
  for (int32_t i = 0; i < prompt_len; ++i) request.prompt.push_back(rng.draw(0, config.vocab_size - 1));
  request.max_new_tokens = rng.one_in(8) ? rng.draw(1, 2 * config.max_model_len) : rng.draw(1, 20);
  request.priority = rng.one_in(4) ? rng.draw(-1, 1) : 0;

  SamplingSpec& sampling = request.sampling;
  sampling.seed = number * 8;
  if (rng.one_in(8)) sampling.seed |= kMayGoBad;
  if (rng.one_in(8)) sampling.seed |= kHostMayStop;
  if (rng.one_in(4)) sampling.seed |= kHasSalt;
  if (rng.one_in(4)) sampling.repetition_penalty = 1.5f;
  request.uses_cache = !rng.one_in(8);
  const int32_t num_stop_ids = rng.one_in(2) ? 0 : rng.draw(1, 6);
  for (int32_t i = 0; i < num_stop_ids; ++i) sampling.stop_ids.push_back(rng.draw(0, config.vocab_size - 1));
  if (rng.one_in(4)) sampling.min_tokens = rng.draw(0, request.max_new_tokens);
  sampling.num_logprobs = rng.draw(-1, config.max_logprobs);
  const int32_t num_biases = rng.one_in(4) ? rng.draw(1, 3) : 0;
  for (int32_t i = 0; i < num_biases; ++i) {
    sampling.logit_bias.emplace_back(bias_token(sampling.seed, i, config.vocab_size), bias_value(i));
  }
  return request;
}

void begin_like(Rng& rng, const LedgerConfig& config, std::span<const int32_t> tokens, RequestSpec& request) {
  if (tokens.empty() || rng.one_in(3)) return;
  const auto length = static_cast<int32_t>(tokens.size());
  const int32_t num_shared = rng.one_in(2) ? length : rng.draw(1, length);
  request.prompt.resize(rng.one_in(3) ? rng.draw(1, 24) : rng.draw(1, 4));
  request.prompt.insert(request.prompt.begin(), tokens.begin(), tokens.begin() + num_shared);
  const auto most = static_cast<size_t>(config.max_model_len);
  if (request.prompt.size() >= most) request.prompt.resize(std::max<size_t>(1, most - 1));
}

RequestSpec invalid_request(Rng& rng, const LedgerConfig& config) {
  RequestSpec request;
  request.prompt = {1};
  const int32_t bad_token = rng.one_in(2) ? -1 : config.vocab_size;
  switch (rng.draw(0, 8)) {
    case 0:
      request.prompt.clear();
      break;
    case 1:
      request.prompt.push_back(bad_token);
      break;
    case 2:
      request.max_new_tokens = rng.draw(-1, 0);
      break;
    case 3:
      request.prompt.resize(config.max_model_len + rng.draw(0, 1), 0);
      break;
    case 4:
      request.sampling.stop_ids = {1, bad_token};
      break;
    case 5:
      request.sampling.stop_ids.resize(kMaxStopIds + 1, 0);
      break;
    case 6:
      request.sampling.min_tokens = rng.one_in(2) ? -1 : request.max_new_tokens + 1;
      break;
    case 7:
      request.sampling.num_logprobs = rng.one_in(2) ? -2 : config.max_logprobs + 1;
      break;
    default:
      request.sampling.logit_bias = {{bad_token, 1.0f}};
  }
  return request;
}

LedgerConfig ample_config(const LedgerConfig& config, int32_t num_requests) {
  LedgerConfig ample = config;
  ample.max_rows = num_requests;
  if (config.num_slots > 0) ample.num_slots = num_requests;
  // A request is refused for want of blocks only where the tiny config refuses it too.
  if (config.num_blocks > 0) ample.num_blocks = num_requests * config.max_blocks_per_row();
  ample.max_step_tokens = std::max(config.max_step_tokens, num_requests * config.max_model_len);
  ample.max_launch_depth = 0;
  ample.use_prefix_cache = false;
  ample.max_snapshots = 0;
  ample.max_waypoints = 0;
  ample.num_host_blocks = ample.num_host_slots = 0;
  return ample;
}

}  // namespace headway::sim
