// A ledger, its device and its client, driven by whoever holds them: the engine's loop without the engine.
#pragma once

#include <cstdint>

#include "core/ledger.h"
#include "tests/sim/client.h"
#include "tests/sim/device.h"
#include "tests/sim/policy.h"

namespace headway::sim {

class Host {
 public:
  explicit Host(const LedgerConfig& config, bool has_replays = false)
      : ledger(config), device(config, has_replays), client(ledger, tally), policy_(ledger) {}

  bool plan();    // one step, handed to the device; checks what the planner promises
  bool run_transfer(bool is_out);  // the oldest between device and host memory that way, if there is one
  bool commit();  // the oldest step, where its results are there
  bool pause(int64_t id);
  bool resume(int64_t id);
  bool evict(int64_t id);
  void reset_prefix_cache();

  // Resumes all and runs until nothing is left; then every pool must be full but for what is cached, and after a reset
  // of the cache full.
  void drain();
  void check_device() const;  // throws CheckFailure where it saw a contradiction

  Tally tally;
  Ledger ledger;
  Device device;
  Client client;
  int64_t num_steps = 0;
  int64_t num_silent_steps = 0;  // without a packet

 private:
  void check_drained();

  PolicyCheck policy_;
  CommitRecord changes_;
};

void add_up(const PrefixStats& stats, PrefixStats& total);
void print(const PrefixStats& stats);  // "prefix": {...}, of the counters

}  // namespace headway::sim
