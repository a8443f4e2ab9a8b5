#include "tests/sim/policy.h"

#include <algorithm>

#include "tests/check.h"

namespace headway::sim {

void PolicyCheck::before_plan(int64_t newest_id) {
  unfinished_.clear();
  waiting_.clear();
  first_running_ = 0;
  for (int64_t id = oldest_unfinished_; id <= newest_id; ++id) {
    const Request* request = ledger_.find(id);
    if (request != nullptr && !request->is_finished()) unfinished_.push_back(id);
  }
  oldest_unfinished_ = unfinished_.empty() ? newest_id + 1 : unfinished_.front();
  std::ranges::sort(unfinished_, [this](int64_t a, int64_t b) {
    const int32_t rank_a = ledger_.find(a)->priority;
    const int32_t rank_b = ledger_.find(b)->priority;
    return rank_a != rank_b ? rank_a < rank_b : a < b;
  });
  for (const int64_t id : unfinished_) {
    const RequestState state = ledger_.find(id)->state;
    if (state == RequestState::kWaiting) waiting_.push_back(id);
    if (state == RequestState::kRunning && first_running_ == 0) first_running_ = id;
  }
  num_in_flight_ = ledger_.num_in_flight();
  num_evictions_ = ledger_.planner().num_evictions();
  num_blocks_fenced_ = ledger_.blocks().num_fenced();
  num_blocks_.assign(ledger_.rows().num_rows() + 1, 0);
  for (int32_t row = 1; row <= ledger_.rows().num_rows(); ++row) {
    if (ledger_.rows().request(row) != nullptr) num_blocks_[row] = ledger_.rows().blocks(row).size();
  }
}

void PolicyCheck::after_plan(const std::optional<Plan>& plan) {
  if (plan) {
    check_budgets(*plan);
    check_rows(*plan);
    check_grants_ahead(*plan);
  }
  check_admission();
  check_eviction();
  check_liveness(plan);
}

void PolicyCheck::check_budgets(const Plan& plan) const {
  const LedgerConfig& config = ledger_.config();
  EXPECT_TRUE(plan.num_rows >= 1 && plan.num_rows <= config.max_rows);
  EXPECT_TRUE(plan.num_tokens >= plan.num_rows && plan.num_tokens <= config.max_step_tokens);
  EXPECT_TRUE(plan.num_decode_rows <= plan.num_sampled && plan.num_sampled <= plan.num_rows);
  EXPECT_TRUE(plan.packet_bytes <= config.packet_entry_bytes());
  EXPECT_TRUE(plan.max_query_len >= 1 && plan.max_query_len <= plan.num_tokens);
  EXPECT_TRUE(plan.max_kv_len >= plan.max_query_len && plan.max_kv_len < config.max_model_len);
  EXPECT_EQ(plan.step, ledger_.clock().launched);
}

// No row twice; decode rows in the order in which requests run.
void PolicyCheck::check_rows(const Plan& plan) const {
  const StepRecord& record = ledger_.record(plan.step);
  EXPECT_EQ(record.rows.size(), static_cast<size_t>(plan.num_rows));
  for (size_t i = 0; i < record.rows.size(); ++i) {
    for (size_t k = 0; k < i; ++k) EXPECT_TRUE(record.rows[i] != record.rows[k]);
    const bool is_ordered = i == 0 || static_cast<int32_t>(i) >= plan.num_decode_rows ||
                            RunsBefore{}(record.requests[i - 1], record.requests[i]);
    EXPECT_TRUE(is_ordered);
  }
}

// Those admitted are the first of those that waited, and do not wait for a running prompt's prefix.
void PolicyCheck::check_admission() const {
  bool is_held_back = false;
  for (const int64_t id : waiting_) {
    const bool still_waits = ledger_.find(id)->state == RequestState::kWaiting;
    EXPECT_TRUE(still_waits || !is_held_back);
    is_held_back |= still_waits && !ledger_.find(id)->awaits_prefix;
  }
}

// Nobody is evicted while a block is coming, and never the one who runs first.
void PolicyCheck::check_eviction() const {
  if (ledger_.planner().num_evictions() == num_evictions_) return;
  EXPECT_EQ(num_blocks_fenced_, 0);
  if (num_in_flight_ == 0 && !waiting_.empty()) return;  // it may give way to one that waits and outranks it
  if (first_running_ != 0) EXPECT_TRUE(ledger_.find(first_running_)->row != kDummyRow);
}

// Blocks are granted ahead only where each running row can still get one.
void PolicyCheck::check_grants_ahead(const Plan& plan) const {
  const RowTable& rows = ledger_.rows();
  for (const int32_t row : ledger_.record(plan.step).rows) {
    const bool is_evicted = rows.request(row) == nullptr;  // while the step was planned
    if (is_evicted || !rows.is_decoding(row)) continue;    // a prompt may hold blocks that the grid cuts off
    const auto num_needed = static_cast<size_t>(ledger_.config().blocks_for(rows.launched_len(row)));
    if (rows.blocks(row).size() <= std::max(num_needed, num_blocks_[row])) continue;
    const int32_t num_available = ledger_.blocks().num_free() + ledger_.prefix_cache().num_evictable_blocks();
    EXPECT_TRUE(static_cast<size_t>(num_available) >= rows.running().size());
  }
}

// With nothing in flight somebody runs, unless a paused row outranks all who could and keeps its memory, or memory is
// on its way between device and host.
void PolicyCheck::check_liveness(const std::optional<Plan>& plan) const {
  if (plan || num_in_flight_ > 0 || ledger_.stats().num_transfers > 0) return;
  const Request* first = nullptr;
  bool is_outranked = false;
  for (const int64_t id : unfinished_) {
    const Request* request = ledger_.find(id);
    const bool is_paused = request->state == RequestState::kPaused;
    if (!is_paused && first == nullptr) first = request;
    if (is_paused && request->row != kDummyRow && first == nullptr) is_outranked = true;
  }
  EXPECT_TRUE(first == nullptr || is_outranked);
}

}  // namespace headway::sim
