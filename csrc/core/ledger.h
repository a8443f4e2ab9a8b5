// The host's truth, as Python holds it: requests, rows, blocks and slots, the plan of each step and the commit of its
// results. Not thread-safe; the binding serialises callers.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/block_pool.h"
#include "core/error.h"
#include "core/planner.h"
#include "core/request.h"
#include "core/ring.h"
#include "core/row_table.h"
#include "core/slot_pool.h"
#include "core/types.h"

namespace headway {

// What the ledger remembers of a launched step until it is committed.
struct StepRecord {
  int64_t step = 0;
  int32_t num_sampled = 0;
  std::vector<int32_t> rows;       // [R] row ids, in the step's order
  std::vector<Request*> requests;  // [R]
  std::vector<Request*> scored;    // of each scored token
};

class Ledger {
 public:
  // The rings' memory may be given: packet_ring_bytes and result_ring_bytes large, 64-byte aligned.
  explicit Ledger(const LedgerConfig& config, uint8_t* packet_ring = nullptr, uint8_t* result_ring = nullptr);
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  // Queues a request and returns its id. Throws RequestError or CapacityError and then changes nothing.
  // The prefix cache shows the request only what others left under the same salt, and nothing if it opts out.
  int64_t add(std::span<const int32_t> prompt, const SamplingSpec& spec, int32_t max_new_tokens, int32_t priority = 0,
              std::string_view salt = {}, bool uses_cache = true);

  // Plans and accounts for the next step; nothing when none can run or max_in_flight are launched.
  std::optional<Plan> plan();
  bool is_ready() const;
  // Retires the oldest step into `changes`, whose memory is reused; false when its results are not there.
  // Throws IntegrityError when host and device disagree.
  bool commit(CommitRecord& changes);

  // Copies between device and host memory to begin now, beside the steps: out in this order and back in this order,
  // neither waiting for the other; null: there is none. Asked for after each plan(), launched or not. Valid until it is
  // finished.
  const Transfer* next_transfer() { return cache_.host() != nullptr ? cache_.host()->next() : nullptr; }
  void finish_transfer(bool is_out) {  // the oldest that was begun that way is done
    require_integrity(cache_.host() != nullptr, "a transfer is finished that nobody was given");
    cache_.host()->finish(is_out);
  }

  // Each returns false when the request is unknown, over, or already where it should go.
  bool abort(int64_t request_id);
  bool finish(int64_t request_id, int32_t num_output_tokens);
  bool pause(int64_t request_id);
  bool resume(int64_t request_id);
  bool evict(int64_t request_id);
  // Drops what is in flight of a request and its last num_positions committed outputs; it goes on from there. Throws
  // RequestError, and then changes nothing, where its KV or state cannot go back so far.
  bool rewind(int64_t request_id, int32_t num_positions);

  // What a guided request may sample next: bit v % 32 of word v / 32 stands for token v. num_tokens: of the sequence
  // that this follows; false when it is over, not guided or has another length. Throws RequestError for an unusable
  // mask.
  bool set_token_mask(int64_t request_id, int32_t num_tokens, std::span<const uint32_t> mask);

  // Requests that got a row in the last plan() and still hold it.
  std::vector<int64_t> admitted_requests() const;

  // Committed outputs of a request that is not over, or was over only after the last plan().
  std::span<const int32_t> output_tokens(int64_t request_id) const;
  int64_t num_in_flight() const { return clock_.num_in_flight(); }
  bool has_unfinished() const { return num_unfinished_ > 0; }
  Stats stats() const;
  PrefixStats prefix_stats() const { return cache_.stats(); }
  void reset_prefix_cache() { cache_.reset(); }  // no later request finds what is cached or computed now
  void check_integrity() const;  // throws IntegrityError naming the first broken invariant
  // Throws IntegrityError naming the first field that is not as the host has it. `mirror` is in host memory, of a
  // device that has run every launched step.
  void check_mirror(const DeviceMirror& mirror) const;

  const LedgerConfig& config() const { return config_; }
  const StepClock& clock() const { return clock_; }
  const RowTable& rows() const { return rows_; }
  const BlockPool& blocks() const { return blocks_; }
  const SlotPool& slots() const { return slots_; }
  const PrefixCache& prefix_cache() const { return cache_; }
  const Planner& planner() const { return planner_; }
  const Request* find(int64_t request_id) const;
  const StepRecord& record(int64_t step) const { return records_[step % config_.max_in_flight()]; }

 private:
  Request* find_unfinished(int64_t request_id);
  void remember(const StepDraft& draft);
  void accept_score(Request& request, const ResultView& results, int32_t index, CommitRecord& changes);
  void accept(Request& request, const ResultRow& result, CommitRecord& changes);
  void report(const Request& request, const ResultRow& result, CommitRecord& changes) const;
  void report_alternatives(const StepRecord& record, const ResultView& results, int32_t index, CommitRecord& changes);
  void require_reachable(const Request& request, int32_t num_positions) const;
  void cut(Request& request, int32_t num_outputs);
  void publish(const StepRecord& record, const ResultView& results);
  void end(Request& request, FinishReason reason);
  void retire(int64_t step);
  void forget_finished();

  struct MirrorRow;
  MirrorRow expected_row(int32_t row) const;
  void check_mirror_place(const DeviceMirror& mirror, int32_t row) const;
  void check_mirror_lists(const DeviceMirror& mirror, int32_t row) const;

  void check_blocks() const;
  void check_rows() const;
  void check_in_flight() const;
  void check_requests() const;
  void check_drained() const;

  LedgerConfig config_;
  StepClock clock_;
  BlockPool blocks_;
  SlotPool slots_;
  RowTable rows_;
  PrefixCache cache_;
  WaitingQueue waiting_;
  Planner planner_;
  EntryRing packets_;
  ResultRing results_;
  std::vector<StepRecord> records_;  // [max_in_flight] by step % max_in_flight
  std::unordered_map<int64_t, std::unique_ptr<Request>> requests_;
  std::vector<Request*> finished_;  // over, but their record is kept
  int64_t next_id_ = 1;
  int64_t num_unfinished_ = 0;
  int64_t num_paused_ = 0;
  int64_t num_finished_ = 0;
  int64_t num_guided_ = 0;  // of the unfinished
};

}  // namespace headway
