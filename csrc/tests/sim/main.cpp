// headway_sim [--traces N] [--seed S] [--threads 1]
//
// N random traces against an asynchronous device, each compared with a serial run (trace.h); with --threads 1 on
// threads. Prints counts as a line of JSON. A failure prints the trace's seed; --traces 1 --seed with it runs it alone.
#include <cstdio>
#include <ctime>
#include <exception>

#include "tests/sim/options.h"
#include "tests/sim/trace.h"

namespace headway::sim {
namespace {

void print(const TraceCounts& counts, double seconds) {
  const auto n = [](int64_t count) { return static_cast<long long>(count); };
  const Tally& tally = counts.tally;
  const auto ends = [&](FinishReason reason) { return n(tally.num_by_reason[static_cast<size_t>(reason)]); };
  std::printf("{\"traces\": %lld, \"traces_per_cpu_s\": %.0f, \"traces_by_depth\": [%lld, %lld, %lld, %lld], ",
              n(counts.num_traces), static_cast<double>(counts.num_traces) / seconds, n(counts.num_by_depth[0]),
              n(counts.num_by_depth[1]), n(counts.num_by_depth[2]), n(counts.num_by_depth[3]));
  std::printf("\"requests\": %lld, \"tokens\": %lld, \"steps\": %lld, \"pauses\": %lld, \"evictions\": %lld, ",
              n(counts.num_requests), n(tally.num_tokens), n(counts.num_steps), n(counts.num_pauses),
              n(counts.num_evictions));
  std::printf("\"void_results\": %lld, \"rewinds\": %lld, ", n(tally.num_void_results), n(tally.num_rewinds));
  sim::print(counts.prefix);
  std::printf("\"ends\": {\"stop\": %lld, \"length\": %lld, \"abort\": %lld, \"error\": %lld, \"host_stop\": %lld}}\n",
              ends(FinishReason::kStop) - n(tally.num_host_stops), ends(FinishReason::kLength),
              ends(FinishReason::kAbort), ends(FinishReason::kError), n(tally.num_host_stops));
}

}  // namespace
}  // namespace headway::sim

int main(int argc, char** argv) {
  using namespace headway::sim;
  const Options options(argc, argv, {"--traces", "--seed", "--threads"});
  const int64_t num_traces = options.get("--traces", 1000);
  const auto first_seed = static_cast<uint64_t>(options.get("--seed", 1));
  const auto run = options.get("--threads", 0) != 0 ? run_threaded_trace : run_trace;
  TraceCounts counts;
  const std::clock_t begin = std::clock();  // of the process: the machine may be shared
  for (uint64_t seed = first_seed; counts.num_traces < num_traces; ++seed) {
    try {
      run(seed, counts);
    } catch (const std::exception& error) {
      std::printf("FAILED --traces 1 --seed %llu: %s\n", static_cast<unsigned long long>(seed), error.what());
      return 1;
    }
  }
  print(counts, static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC);
  return 0;
}
