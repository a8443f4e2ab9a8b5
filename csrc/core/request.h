// One request from submission to its end, and the queue of those that wait for a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "core/types.h"

namespace headway {

enum class RequestState : uint8_t {
  kWaiting,   // in the queue: never admitted, or evicted
  kRunning,   // holds a row and is planned
  kPaused,    // is not planned; keeps its row unless it has none or is evicted
  kFinished,  // over; the record stays until the last launched step that names it has retired
};

struct Request;

// Who runs first: lower priority value, then earlier arrival. Ids count up, so they are the arrival order.
struct RunsBefore {
  bool operator()(const Request* a, const Request* b) const;
};
using WaitingSet = std::set<Request*, RunsBefore>;

struct Request {
  // Read for every sampled token.
  std::vector<int32_t> tokens;  // prompt, then committed outputs; reserved to max_total_len
  int32_t prompt_len = 0;
  int32_t min_total_len = 0;  // stop ids count from this many tokens on
  int32_t max_total_len = 0;  // the request ends for length at this many tokens
  int32_t num_logprobs = -1;
  int32_t row = kDummyRow;  // kDummyRow while it holds none
  RequestState state = RequestState::kWaiting;
  FinishReason finish_reason = FinishReason::kNotFinished;
  std::vector<int32_t> stop_ids;
  int64_t id = 0;
  int32_t num_delivered = 0;  // outputs handed out by commits and kept

  int32_t priority = 0;
  int32_t num_evictions = 0;
  int64_t last_step = 0;  // last launched step that names it; set when its row is released
  int64_t void_step = 0;  // results of steps up to this one are void: the request was rewound since
  RowSampling sampling = {};
  std::vector<std::pair<int32_t, float>> logit_bias;
  std::vector<int32_t> bad_words;    // entries of DeviceMirror::bad_words
  std::vector<uint32_t> token_mask;  // empty: none
  bool is_guided = false;            // its mask is for one position
  int32_t mask_len = 0;              // that position
  bool is_mask_sent = false;         // since its admission, or since the mask was set
  int32_t num_prompt_logprobs = -1;
  int32_t num_scored = 0;  // prompt tokens whose scoring has been launched; scored once, however often recomputed
  int32_t root = 0;  // of its salt in the prefix tree; 0: it neither reads the cache nor leaves anything there
  int32_t num_cached_tokens = 0;
  bool awaits_prefix = false;  // lets others pass: what it begins with is about to be there
  bool has_awaited_prefix = false;
  PrefixMatch match;
  int64_t match_version = -1;  // of the tree when the match was made
  int32_t host_node = 0;  // of the host tier: where the request could start if that came back; 0: nowhere further
  int64_t host_version = -1;  // of both trees, when that was found
  int64_t load_number = 0;  // of the transfer that brings its prefix back; 0: none, since it last had a row
  int32_t loaded_start = 0;
  WaitingSet::node_type wait_node;  // its place in the queue while it is outside, so that queueing never allocates

  int32_t num_tokens() const { return static_cast<int32_t>(tokens.size()); }
  int32_t num_outputs() const { return num_tokens() - prompt_len; }
  int32_t num_words() const { return static_cast<int32_t>(stop_ids.size() + 2 * logit_bias.size() + bad_words.size()); }
  // Whether it cannot sample at this position, because what may be sampled there is not known yet.
  bool is_held_at(int32_t position) const { return is_guided && mask_len != position; }
  bool is_finished() const { return state == RequestState::kFinished; }
};

inline bool RunsBefore::operator()(const Request* a, const Request* b) const {
  return a->priority != b->priority ? a->priority < b->priority : a->id < b->id;
}

// Why the sequence ends with `token` as its next token, or kNotFinished. The device applies the same rule.
FinishReason verdict(const Request& request, int32_t token);

// Throws RequestError where it has another number of words or allows nothing.
void validate_token_mask(const LedgerConfig& config, std::span<const uint32_t> mask);

// Throws RequestError or CapacityError; a request that passes can always run when it is alone.
void validate_request(const LedgerConfig& config, std::span<const int32_t> prompt, const SamplingSpec& spec,
                      int32_t max_new_tokens);

// Fills everything but the id from validated arguments.
void fill_request(const LedgerConfig& config, std::span<const int32_t> prompt, const SamplingSpec& spec,
                  int32_t max_new_tokens, Request& request);

class WaitingQueue {
 public:
  bool is_empty() const { return queue_.empty(); }
  int64_t size() const { return static_cast<int64_t>(queue_.size()); }
  const WaitingSet& requests() const { return queue_; }
  bool contains(Request& request) const { return queue_.contains(&request); }
  void push_new(Request& request) { queue_.insert(&request); }
  void push_back_in(Request& request) { queue_.insert(std::move(request.wait_node)); }
  void remove(Request& request) { request.wait_node = queue_.extract(&request); }

 private:
  WaitingSet queue_;
};

}  // namespace headway
