// One random trace: requests arrive, are aborted, paused, evicted and stopped while a device runs steps late and in
// phases. Then the same requests again, one step at a time with memory for all: the streams must be equal.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/sim/host.h"

namespace headway::sim {

struct TraceCounts {
  int64_t num_traces = 0;
  int64_t num_by_depth[4] = {};
  int64_t num_requests = 0;
  int64_t num_steps = 0;
  int64_t num_pauses = 0;
  int64_t num_evictions = 0;
  PrefixStats prefix;
  Tally tally;
};

void add_up(const Tally& tally, Tally& total);

// Serves what a client submitted on an ample, serial ledger; throws CheckFailure where a stream differs. An aborted
// request must have got the beginning of its stream.
void compare_with_serial(const Client& client, const LedgerConfig& config);

// Throws CheckFailure; a trace is a pure function of its seed.
void run_trace(uint64_t seed, TraceCounts& counts);

// The same with four threads: the engine's, the device's for steps and for copies to host memory and back, and one that
// submits and aborts behind the engine's lock. How they interleave is the machine's choice. Made for the thread
// sanitizer.
void run_threaded_trace(uint64_t seed, TraceCounts& counts);

}  // namespace headway::sim
