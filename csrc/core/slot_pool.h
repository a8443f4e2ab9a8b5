// Mamba state slots. A slot is owned by exactly one ticket; a ticket that is dropped gives its slot back.
#pragma once

#include <cstdint>
#include <utility>

#include "core/fenced_pool.h"

namespace headway {

class SlotTicket {
 public:
  SlotTicket() = default;  // holds the dummy slot, which nobody owns
  SlotTicket(FencedPool& pool, int32_t slot) : pool_(&pool), slot_(slot) {}
  SlotTicket(SlotTicket&& other) noexcept
      : pool_(std::exchange(other.pool_, nullptr)), slot_(std::exchange(other.slot_, kDummySlot)) {}
  SlotTicket& operator=(SlotTicket&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(slot_, other.slot_);
    return *this;
  }
  // Dropped without a word, the slot waits for the newest launched step: always late enough.
  ~SlotTicket() {
    if (pool_ != nullptr) release(pool_->clock().launched);
  }

  int32_t slot() const { return slot_; }

  void release(int64_t last_step) {
    if (pool_ != nullptr) pool_->release(slot_, last_step);
    pool_ = nullptr;
    slot_ = kDummySlot;
  }

 private:
  FencedPool* pool_ = nullptr;
  int32_t slot_ = kDummySlot;
};

class SlotPool {
 public:
  SlotPool(const LedgerConfig& config, const StepClock& clock)
      : ids_(config.num_slots, config.max_in_flight(), clock) {}

  // A model without state has no slots; its rows all hold the dummy.
  bool has_room() const { return ids_.num_total() == 0 || ids_.num_free() > 0; }
  SlotTicket acquire() { return ids_.num_total() == 0 ? SlotTicket() : SlotTicket(ids_, ids_.take()); }
  void retire(int64_t step) { ids_.retire(step); }

  int32_t num_free() const { return ids_.num_free(); }
  int32_t num_fenced() const { return ids_.num_fenced(); }
  const FencedPool& ids() const { return ids_; }

 private:
  FencedPool ids_;
};

}  // namespace headway
