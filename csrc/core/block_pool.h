// KV blocks: reference counts over fenced ids. A block belongs to as many block tables, and to the prefix tree, as its
// count says.
#pragma once

#include <cstdint>
#include <vector>

#include "core/error.h"
#include "core/fenced_pool.h"

namespace headway {

class BlockPool {
 public:
  BlockPool(const LedgerConfig& config, const StepClock& clock)
      : ids_(config.num_blocks, config.max_in_flight(), clock), ref_counts_(config.num_blocks + 1, 0) {}

  int32_t acquire() {
    const int32_t block = ids_.take();
    ref_counts_[block] = 1;
    return block;
  }

  // One more holder of a block that has one.
  void share(int32_t block) {
    require_integrity(ref_counts_[block] > 0, "a block was shared that nobody holds");
    ++ref_counts_[block];
  }

  // last_step: the last launched step of the table that gives the block back.
  void release(int32_t block, int64_t last_step) {
    require_integrity(ref_counts_[block] > 0, "a block was released that nobody holds");
    if (--ref_counts_[block] == 0) ids_.release(block, last_step);
  }

  void retire(int64_t step) { ids_.retire(step); }

  int32_t num_free() const { return ids_.num_free(); }
  int32_t num_fenced() const { return ids_.num_fenced(); }
  int32_t ref_count(int32_t block) const { return ref_counts_[block]; }
  const FencedPool& ids() const { return ids_; }

 private:
  FencedPool ids_;
  std::vector<int32_t> ref_counts_;  // [num_blocks + 1]
};

}  // namespace headway
