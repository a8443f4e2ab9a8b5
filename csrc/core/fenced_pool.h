// Ids 1..n of one kind (blocks, slots, rows) whose release is fenced: an id given back while a launched step still
// names it becomes free when that step has retired. Knows nothing of what an id stands for.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/types.h"

namespace headway {

class FencedPool {
 public:
  enum class State : uint8_t { kFree, kLive, kFenced };

  // At most max_in_flight steps are ever launched and not retired; `clock` is the ledger's and outlives the pool.
  FencedPool(int32_t num_ids, int32_t max_in_flight, const StepClock& clock);

  int32_t take();                               // needs num_free() > 0
  void release(int32_t id, int64_t last_step);  // last_step: the last launched step that names the id
  void retire(int64_t step);

  int32_t num_total() const { return static_cast<int32_t>(states_.size()) - 1; }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t num_fenced() const { return num_fenced_; }
  int32_t num_live() const { return num_total() - num_free() - num_fenced_; }
  State state(int32_t id) const { return states_[id]; }
  int64_t fence_step(int32_t id) const { return fence_steps_[id]; }
  const StepClock& clock() const { return clock_; }

  void check_integrity(const char* kind) const;  // I2, I3, I8 for the pool itself

 private:
  const StepClock& clock_;
  std::vector<int32_t> free_;         // a stack
  std::vector<State> states_;         // [n + 1] by id; the dummy is live for ever
  std::vector<int64_t> fence_steps_;  // [n + 1] the step a fenced id waits for
  std::vector<int32_t> next_;         // [n + 1] links of the fence lists
  std::vector<int32_t> fence_heads_;  // [max_in_flight] by step % max_in_flight; 0 ends a list
  int32_t num_fenced_ = 0;
};

}  // namespace headway
