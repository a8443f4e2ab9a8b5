// What a user of the ledger sees of its requests, held against what the language says they must be: every token, one
// end each with the right reason, and nothing after the end. Knows nothing of rows, blocks and slots.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "core/ledger.h"
#include "tests/sim/language.h"
#include "tests/sim/workload.h"

namespace headway::sim {

struct Conversation {
  RequestSpec spec;
  int32_t max_total_len = 0;
  Context context;               // prompt and outputs
  std::vector<int32_t> outputs;  // after a stop string those that were kept
  FinishReason reason = FinishReason::kNotFinished;
  bool is_paused = false;

  bool is_over() const { return reason != FinishReason::kNotFinished; }
};

// What happened, so that a run shows that it reached what it is about.
struct Tally {
  int64_t num_tokens = 0;
  int64_t num_by_reason[5] = {};  // by FinishReason
  int64_t num_host_stops = 0;
  int64_t num_rewinds = 0;
  int64_t num_refused_rewinds = 0;
  int64_t num_void_results = 0;  // sampled for a request that was over or rewound by then
};

class Client {
 public:
  Client(Ledger& ledger, Tally& tally) : ledger_(ledger), tally_(tally) {}

  // The id, or 0 where the ledger has no room for such a request ever.
  int64_t add(const RequestSpec& spec);
  // Prompt and outputs of one of the last requests; empty before the first.
  std::vector<int32_t> tokens_of_one(Rng& rng) const;
  // Checks a commit's records, then plays the host's part: ends those whose text reached a stop string.
  void receive(const CommitRecord& changes, int32_t num_sampled);
  bool abort(int64_t id);
  bool finish(int64_t id, int32_t num_kept);
  // False where it changed nothing. A refusal must have a reason that the client knows of.
  bool rewind(int64_t id, int32_t num_positions);
  void check_outputs(int64_t id) const;

  const std::map<int64_t, Conversation>& conversations() const { return conversations_; }
  Conversation* find(int64_t id);
  void forget(int64_t id) { conversations_.erase(id); }
  int64_t num_unfinished() const { return num_unfinished_; }
  int64_t newest_id() const { return newest_id_; }

 private:
  bool may_refuse(const Conversation& conversation, int32_t num_positions) const;
  void receive_one(const CommitRecord& changes, size_t i);
  FinishReason expected_end(const Conversation& conversation, int32_t token) const;
  void check_alternatives(const CommitRecord& changes, size_t i, int32_t num_wanted) const;
  void end(Conversation& conversation, FinishReason reason);

  Ledger& ledger_;
  Tally& tally_;
  std::map<int64_t, Conversation> conversations_;
  int64_t num_unfinished_ = 0;
  int64_t newest_id_ = 0;
};

}  // namespace headway::sim
