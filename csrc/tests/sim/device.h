// An asynchronous device for simulations: runs the CPU backend's own begin_step and finish_step on its own mirror, and
// between them a model whose memory is tagged. Every KV cell and state slot records all the tokens it was made from, as
// a hash; what is sampled is a hash of what is read back. A block or slot handed out too early or to a sequence that
// begins otherwise, a wrong block table, a lost or repeated token therefore raises a fault or changes a stream. So does
// a slot that one row of a step writes and another reads.
//
// Knows of the ledger what a real device knows: plans and their packets, read when the step runs, not when launched.
// With replays, steps that only decode run as a captured graph would: padded rows, the packet at one fixed address, the
// step and the ring entry from the device's own counter.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "core/host_tier.h"
#include "core/types.h"
#include "params/step.h"
#include "tests/sim/language.h"

namespace headway::sim {

class Device {
 public:
  explicit Device(const LedgerConfig& config, bool has_replays = false);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  void launch(const Plan& plan) { pending_.push_back(plan); }
  // Copies between device and host memory, of either way one after another, at any time beside the steps.
  void begin(const Transfer& transfer) { (transfer.is_out ? saves_ : loads_).push_back(transfer); }
  bool run_transfer(bool is_out);  // the oldest that way; false when there is none
  // One phase of the oldest step: apply its packet, write its tokens, or read, sample and publish.
  bool advance();
  // The rest of the oldest step; false when there is none.
  bool run_one();

  const DeviceMirror& mirror() const { return mirror_; }
  size_t num_pending() const { return pending_.size(); }
  const std::string& fault() const { return fault_; }  // the first contradiction seen; empty: none

 private:
  enum class Phase { kBegin, kWrite, kFinish };
  struct Cell {
    uint64_t content = 0;  // of the sequence up to this token
    int32_t token = -1;
  };
  struct State {
    uint64_t content = 0;
    int32_t num_tokens = -1;
    bool has_log = false;  // decode steps leave an older state and inputs since; prompts cannot start from that
    int32_t newest_len = 0;  // the most tokens it ever had
    std::vector<uint64_t> past = {};  // [num_tokens] its content after so many tokens; 0 where it did not see them
  };

  bool is_replayed(const Plan& plan) const { return has_replays_ && plan.num_decode_rows == plan.num_rows; }
  void begin(const Plan& plan);
  void begin_replayed(const Plan& plan);
  void check_inputs(const Plan& plan);
  void forget_tables(const Plan& plan);
  void check_bias_lists(const Plan& plan);
  void write(const Plan& plan);
  void write_cell(int32_t row, int32_t position, int32_t token);
  void write_state(const Plan& plan, int32_t i, int32_t row);
  void copy_states(const Plan& plan);
  void check_slots(const Plan& plan);
  void go_back(State& state, int32_t num_tokens, int32_t base);
  void finish(const Plan& plan);
  ResultRow sample(int32_t i);
  bool is_stopped(int32_t row, int32_t token, int32_t kv_len) const;
  Context read_cells(int32_t row, int32_t num_tokens);
  const Cell* cell(int32_t row, int32_t position);  // null: a fault
  uint64_t content_before(int32_t row, int32_t position);
  void check_history(int32_t row, const Context& context, int32_t num_tokens);
  void check_state(int32_t row, const Context& context, int32_t num_tokens);
  void expect(bool holds, const char* what) {
    if (!holds && fault_.empty()) fault_ = what;
  }

  const LedgerConfig config_;
  const bool has_replays_;
  std::deque<Plan> pending_;
  std::deque<Transfer> saves_;
  std::deque<Transfer> loads_;
  Phase phase_ = Phase::kBegin;
  std::string fault_;

  DeviceMirror mirror_ = {};
  StepInputs inputs_ = {};
  StepCounter counter_ = {};
  std::vector<uint8_t> fixed_packet_;  // where replayed steps look for theirs
  int32_t num_live_ = 0;  // rows of the newest packet
  std::vector<std::vector<int32_t>> int_buffers_;  // behind mirror_ and inputs_
  std::vector<float> bias_values_;
  std::vector<uint32_t> token_masks_;
  std::vector<RowSampling> sampling_;
  std::vector<StepRow> live_;
  std::vector<ResultRow> results_;
  std::vector<int32_t> top_ids_;
  std::vector<float> top_logprobs_;

  std::vector<uint8_t> has_begun_;  // [max_rows + 1] whether a step has computed tokens of the row since its RowInit
  std::vector<Cell> cells_;  // [num_blocks + 1, block_size]
  std::vector<State> states_;  // [num_slots + 1]
  std::vector<Cell> host_cells_;  // [num_host_blocks + 1, block_size]
  std::vector<State> host_states_;  // [num_host_slots + 1]
  std::vector<int32_t> host_base_;  // likewise, of their logs
};

// What the device reports beside the token, so that a commit which mixes rows up is seen.
inline float logprob_of(int32_t token) {
  return -0.25f * static_cast<float>(token + 1);
}
inline int32_t rank_of(int32_t token) {
  return token % 7 + 1;
}
// What requests ask for beside that, by which the device recognises its lists.
inline int32_t bias_token(uint64_t seed, int32_t i, int32_t vocab_size) {
  return static_cast<int32_t>((seed / 8 + static_cast<uint64_t>(i)) % static_cast<uint64_t>(vocab_size));
}
inline float bias_value(int32_t i) {
  return 0.5f * static_cast<float>(i) - 1.0f;
}
inline int32_t alternative(int32_t token, int32_t k, int32_t vocab_size) {
  return (token + k) % vocab_size;
}

}  // namespace headway::sim
