#include "core/fenced_pool.h"

#include <string>

#include "core/error.h"

namespace headway {

FencedPool::FencedPool(int32_t num_ids, int32_t max_in_flight, const StepClock& clock)
    : clock_(clock),
      states_(num_ids + 1, State::kFree),
      fence_steps_(num_ids + 1, 0),
      next_(num_ids + 1, 0),
      fence_heads_(max_in_flight, 0) {
  states_[0] = State::kLive;
  free_.reserve(num_ids);
  for (int32_t id = num_ids; id > 0; --id) free_.push_back(id);
}

int32_t FencedPool::take() {
  require_integrity(!free_.empty(), "an id was taken from an empty pool");
  const int32_t id = free_.back();
  free_.pop_back();
  states_[id] = State::kLive;
  return id;
}

void FencedPool::release(int32_t id, int64_t last_step) {
  require_integrity(id > 0 && states_[id] == State::kLive, "an id was released that was not held");
  if (clock_.has_retired(last_step)) {
    states_[id] = State::kFree;
    free_.push_back(id);
    return;
  }
  states_[id] = State::kFenced;
  fence_steps_[id] = last_step;
  int32_t& head = fence_heads_[last_step % fence_heads_.size()];
  next_[id] = head;
  head = id;
  ++num_fenced_;
}

void FencedPool::retire(int64_t step) {
  int32_t& head = fence_heads_[step % fence_heads_.size()];
  for (int32_t id = head; id != 0; id = next_[id]) {
    states_[id] = State::kFree;
    free_.push_back(id);
    --num_fenced_;
  }
  head = 0;
}

void FencedPool::check_integrity(const char* kind) const {
  const auto require = [kind](bool holds, const char* what) {
    if (!holds) throw IntegrityError(std::string(kind) + ": " + what);
  };
  std::vector<uint8_t> seen(states_.size(), 0);
  for (const int32_t id : free_) {
    require(id > 0, "I8: the dummy is in the free list");
    require(seen[id]++ == 0, "I3: an id is twice in the free list");
    require(states_[id] == State::kFree, "I3: an id is free and held at once");
  }
  int32_t num_linked = 0;
  for (const int32_t head : fence_heads_) {
    for (int32_t id = head; id != 0; id = next_[id], ++num_linked) {
      require(seen[id]++ == 0, "I3: a fenced id is free or fenced twice");
      require(states_[id] == State::kFenced, "I3: an id waits for a fence but is not fenced");
      require(!clock_.has_retired(fence_steps_[id]), "I7: an id waits for a step that has retired");
    }
  }
  int32_t num_states[3] = {0, 0, 0};
  for (size_t id = 1; id < states_.size(); ++id) ++num_states[static_cast<int>(states_[id])];
  require(num_linked == num_fenced_ && num_states[2] == num_fenced_, "I2: the fenced count is wrong");
  require(num_states[0] == num_free() && num_states[1] == num_live(), "I2: free + live + fenced is not the total");
  require(states_[0] == State::kLive, "I8: the dummy is not held");
}

}  // namespace headway
