// Whether a plan keeps the planner's promises: its budgets, first come first served within a priority, and memory taken
// from nobody who outranks. Looks at the ledger before and after a plan; knows nothing of how it was made.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/ledger.h"

namespace headway::sim {

class PolicyCheck {
 public:
  explicit PolicyCheck(const Ledger& ledger) : ledger_(ledger) {}

  void before_plan(int64_t newest_id);
  void after_plan(const std::optional<Plan>& plan);  // throws CheckFailure

 private:
  void check_budgets(const Plan& plan) const;
  void check_rows(const Plan& plan) const;
  void check_admission() const;
  void check_eviction() const;
  void check_grants_ahead(const Plan& plan) const;
  void check_liveness(const std::optional<Plan>& plan) const;

  const Ledger& ledger_;
  std::vector<int64_t> unfinished_;  // ids, those that run first come first
  std::vector<int64_t> waiting_;  // likewise
  int64_t first_running_ = 0;  // of those that hold a row and are not paused
  int64_t oldest_unfinished_ = 1;
  int64_t num_in_flight_ = 0;
  int64_t num_evictions_ = 0;
  int32_t num_blocks_fenced_ = 0;
  std::vector<size_t> num_blocks_;  // [max_rows + 1] of the row's table
};

}  // namespace headway::sim
