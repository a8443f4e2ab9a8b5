// headway_fuzz [--ops N] [--seed S] [--check-every K] [--episode E]
//
// Random operations on random small ledgers until N public operations were done: episodes of some hundred operations,
// each a pure function of its own seed, each ending with a drain after which every pool must be full. Integrity is
// checked after every K-th operation (default 1; 0: never, which shows what the device and the client see by
// themselves). Prints counts and speed as a line of JSON. A failure prints the episode's seed; --episode runs that
// one alone.
#include <cstdio>
#include <ctime>
#include <exception>
#include <iterator>
#include <string>

#include "tests/check.h"
#include "tests/fuzz/random_ops.h"
#include "tests/sim/options.h"

namespace headway::sim {
namespace {

struct Totals {
  int64_t num_ops = 0;
  int64_t num_episodes = 0;
  int64_t num_steps = 0;
  int64_t num_silent_steps = 0;
  int64_t num_evictions = 0;
  int64_t num_requests = 0;
  int64_t num_done[kNumOps] = {};
  PrefixStats prefix;
  Tally tally;
};

void add_up(const Host& host, const RandomOps& ops, Totals& totals) {
  ++totals.num_episodes;
  totals.num_steps += host.num_steps;
  totals.num_silent_steps += host.num_silent_steps;
  totals.num_evictions += host.ledger.stats().num_evictions;
  totals.num_requests += host.client.newest_id();
  sim::add_up(host.ledger.prefix_stats(), totals.prefix);
  totals.tally.num_tokens += host.tally.num_tokens;
  totals.tally.num_host_stops += host.tally.num_host_stops;
  totals.tally.num_void_results += host.tally.num_void_results;
  totals.tally.num_rewinds += host.tally.num_rewinds;
  totals.tally.num_refused_rewinds += host.tally.num_refused_rewinds;
  for (size_t i = 0; i < std::size(totals.tally.num_by_reason); ++i) {
    totals.tally.num_by_reason[i] += host.tally.num_by_reason[i];
  }
  for (int32_t op = 0; op < kNumOps; ++op) totals.num_done[op] += ops.num_done(static_cast<Op>(op));
}

std::string describe(const LedgerConfig& config) {
  char text[240];
  std::snprintf(text, sizeof(text),
                "rows %d, blocks %d x %d, slots %d, model len %d, step tokens %d, depth %d, ahead %d, grid %d",
                config.max_rows, config.num_blocks, config.block_size, config.num_slots, config.max_model_len,
                config.max_step_tokens, config.max_launch_depth, config.grant_ahead_blocks, config.prompt_grid_tokens);
  return text;
}

void run_episode(uint64_t seed, int64_t check_every, Totals& totals) {
  Rng rng(seed);
  const LedgerConfig config = random_config(rng);
  Host host(config, rng.one_in(2));
  RandomOps ops(host, rng, rng.draw(1, 12));
  const int32_t num_ops = rng.one_in(16) ? rng.draw(1000, 4000) : rng.draw(50, 500);
  int32_t op = 0;
  try {
    for (; op < num_ops; ++op) {
      ops.run_one();
      ++totals.num_ops;
      if (check_every > 0 && totals.num_ops % check_every == 0) host.ledger.check_integrity();
    }
    host.drain();
    if (check_every > 0) host.ledger.check_integrity();
    for (int64_t id = 1; id <= host.client.newest_id(); ++id) host.client.check_outputs(id);
  } catch (const std::exception& error) {
    throw checks::CheckFailure("operation " + std::to_string(op) + " of " + std::to_string(num_ops) + " (" +
                               describe(config) + "): " + error.what());
  }
  add_up(host, ops, totals);
}

void print(const Totals& totals, double seconds) {
  const auto n = [](int64_t count) { return static_cast<long long>(count); };
  const auto done = [&](Op op) { return n(totals.num_done[static_cast<size_t>(op)]); };
  const Tally& tally = totals.tally;
  const auto ends = [&](FinishReason reason) { return n(tally.num_by_reason[static_cast<size_t>(reason)]); };
  std::printf("{\"ops\": %lld, \"ops_per_cpu_s\": %.0f, \"episodes\": %lld, \"requests\": %lld, \"tokens\": %lld, ",
              n(totals.num_ops), static_cast<double>(totals.num_ops) / seconds, n(totals.num_episodes),
              n(totals.num_requests), n(tally.num_tokens));
  std::printf("\"steps\": %lld, \"steps_without_packet\": %lld, \"evictions\": %lld, \"void_results\": %lld, ",
              n(totals.num_steps), n(totals.num_silent_steps), n(totals.num_evictions), n(tally.num_void_results));
  std::printf("\"ends\": {\"stop\": %lld, \"length\": %lld, \"abort\": %lld, \"error\": %lld, \"host_stop\": %lld}, ",
              ends(FinishReason::kStop) - n(tally.num_host_stops), ends(FinishReason::kLength),
              ends(FinishReason::kAbort), ends(FinishReason::kError), n(tally.num_host_stops));
  std::printf("\"rewinds\": %lld, \"refused_rewinds\": %lld, ", n(tally.num_rewinds), n(tally.num_refused_rewinds));
  sim::print(totals.prefix);
  std::printf(
      "\"refused\": %lld, \"commits\": %lld, \"pauses\": %lld, \"resumes\": %lld, \"forced_evictions\": %lld, "
      "\"cache_resets\": %lld}\n",
      done(Op::kAddInvalid), done(Op::kCommit), done(Op::kPause), done(Op::kResume), done(Op::kEvict),
      done(Op::kResetCache));
}

}  // namespace
}  // namespace headway::sim

int main(int argc, char** argv) {
  using namespace headway::sim;
  const Options options(argc, argv, {"--ops", "--seed", "--check-every", "--episode"});
  const bool is_single = options.has("--episode");
  const int64_t num_ops = is_single ? 1 : options.get("--ops", 1000000);
  const int64_t check_every = options.get("--check-every", 1);
  uint64_t seed = static_cast<uint64_t>(is_single ? options.get("--episode", 0) : options.get("--seed", 1) << 32);
  Totals totals;
  const std::clock_t begin = std::clock();  // of the process: the machine may be shared
  for (; totals.num_ops < num_ops; ++seed) {
    try {
      run_episode(seed, check_every, totals);
    } catch (const std::exception& error) {
      std::printf("FAILED --episode %llu: %s\n", static_cast<unsigned long long>(seed), error.what());
      return 1;
    }
  }
  print(totals, static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC);
  return 0;
}
