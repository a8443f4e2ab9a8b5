// Random operations on a ledger with tiny pools. What is drawn how often differs from episode to episode, so that some
// never abort, some never stop evicting, some fill every pool.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/sim/host.h"

namespace headway::sim {

enum class Op : uint8_t {
  kAdd,
  kAddInvalid,
  kPlan,
  kCommit,
  kAbort,
  kPause,
  kResume,
  kEvict,
  kFinish,
  kRewind,
  kRead,
  kResetCache,
};
inline constexpr int32_t kNumOps = 12;

class RandomOps {
 public:
  RandomOps(Host& host, Rng& rng, int32_t max_unfinished);

  void run_one();  // one public operation of the ledger; the device may move before it
  int64_t num_done(Op op) const { return num_done_[static_cast<size_t>(op)]; }

 private:
  Op draw_op();
  bool run(Op op);
  bool add();
  bool add_invalid();
  bool finish();
  bool rewind();
  void read();
  int64_t find_recomputed() const;
  int64_t draw_id();

  Host& host_;
  Rng& rng_;
  const int32_t max_unfinished_;
  int32_t weights_[kNumOps];
  int32_t total_weight_ = 0;
  int32_t device_delay_;
  int64_t num_done_[kNumOps] = {};  // that changed something
};

}  // namespace headway::sim
