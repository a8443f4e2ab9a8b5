// A device for checks: executes launched steps late and in order, knows only what packets tell it, and keeps every
// token in KV blocks and state slots. What it samples is a function of what it reads there, so a block or slot handed
// out too early, a wrong position or a lost token changes the outputs or raises a fault.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/ledger.h"

namespace headway::checks {

class FakeDevice {
 public:
  explicit FakeDevice(const LedgerConfig& config);

  void launch(const Plan& plan) { pending_.push_back(plan); }
  bool run_one();  // executes the oldest launched step and publishes its results; false when there is none
  void run(const Transfer& transfer);  // between its memory and the host's
  size_t num_pending() const { return pending_.size(); }

  // The model: the next token from all tokens of a sequence. By default a hash of them.
  std::function<int32_t(const std::vector<int32_t>&)> next_token;
  // Lets a check spoil one result before it is published.
  std::function<void(ResultRow&)> tamper;

  const std::string& fault() const { return fault_; }  // the first contradiction seen; empty: none
  int64_t num_packets() const { return num_packets_; }
  int64_t num_grants() const { return num_grants_; }
  int64_t num_inits() const { return num_inits_; }
  const std::vector<StepRow>& live() const { return live_; }
  const RowSampling& sampling(int32_t row) const { return mirror_[row].sampling; }
  const std::vector<std::pair<int32_t, float>>& logit_bias(int32_t row) const { return mirror_[row].logit_bias; }

 private:
  struct MirrorRow {
    int32_t last_token = 0;
    int32_t num_computed = 0;
    int32_t slot = 0;
    bool is_stopped = false;
    RowSampling sampling = {};
    std::vector<int32_t> stop_ids;
    std::vector<std::pair<int32_t, float>> logit_bias;
    std::vector<int32_t> block_table;
    std::vector<int32_t> history;
  };

  void apply(const Plan& plan);
  void reset(const RowInit& init, const int32_t* words);
  void restore(MirrorRow& row, const StepRow& step_row, const int32_t* tokens);
  void take_snapshots(const Plan& plan, int32_t row_index, const MirrorRow& row);
  void compute(MirrorRow& row, int32_t token);
  std::vector<int32_t> read(const MirrorRow& row);
  ResultRow sample(int32_t row_id);
  void publish(const Plan& plan, const std::vector<ResultRow>& results);
  void expect(bool holds, const char* what);

  LedgerConfig config_;
  std::deque<Plan> pending_;
  std::vector<MirrorRow> mirror_;
  std::vector<std::vector<int32_t>> blocks_;  // [num_blocks + 1][block_size] tokens
  std::vector<std::vector<int32_t>> states_;  // [num_slots + 1] the tokens that made the state
  std::vector<std::vector<int32_t>> host_blocks_;  // [num_host_blocks + 1]
  std::vector<std::vector<int32_t>> host_states_;  // [num_host_slots + 1]
  std::vector<StepRow> live_;
  std::string fault_;
  int64_t num_packets_ = 0;
  int64_t num_grants_ = 0;
  int64_t num_inits_ = 0;
};

// A ledger, its device, and what came out, by request.
class Rig {
 public:
  explicit Rig(const LedgerConfig& config) : ledger(config), device(config) {}

  int64_t add(const std::vector<int32_t>& prompt, int32_t max_new_tokens, const SamplingSpec& spec = {},
              int32_t priority = 0) {
    return ledger.add(prompt, spec, max_new_tokens, priority);
  }
  bool launch();                        // plans one step and hands it to the device
  bool retire();                        // executes and commits the oldest step; checks integrity
  void run(int32_t max_steps = 10000);  // as far ahead as the ledger lets, until it comes to rest

  Ledger ledger;
  FakeDevice device;
  Plan plan;             // the newest
  CommitRecord changes;  // the newest
  std::map<int64_t, std::vector<int32_t>> outputs;
  std::map<int64_t, FinishReason> reasons;
};

}  // namespace headway::checks
