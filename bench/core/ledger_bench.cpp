// ledger_bench [steps]: host time of one step of decode, plan and commit apart, by number of rows: medians, since the
// machine may be shared. Steps that grant blocks, and so bring a packet, are also shown alone. A stand-in for the
// device writes the results outside the measured time. Exits 1 if a measured step allocated.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/ledger.h"
#include "tests/counting_new.h"

namespace headway {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int32_t kPromptLen = 64;
constexpr int32_t kBlockSize = 16;

struct Timing {
  std::vector<double> plan_us;
  std::vector<double> commit_us;
  std::vector<double> total_us;
  std::vector<double> packet_us;  // total of the steps that brought a packet
  int64_t num_allocations = 0;
};

double median(std::vector<double> values) {
  if (values.empty()) return 0.0;
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

LedgerConfig bench_config(int32_t num_rows, int32_t num_steps) {
  const int32_t max_model_len = kPromptLen + num_steps + 64;
  return {.max_rows = num_rows,
          .num_blocks = num_rows * (max_model_len / kBlockSize + 4),
          .block_size = kBlockSize,
          .num_slots = num_rows,
          .max_model_len = max_model_len,
          .max_step_tokens = num_rows * kPromptLen,
          .vocab_size = 131072,
          .max_logprobs = 0,
          .max_launch_depth = 1};
}

// The rows of the step that samples; those of the newest packet.
void publish(const Plan& plan, std::vector<int32_t>& live) {
  if (plan.packet != nullptr) {
    const auto* header = reinterpret_cast<const PacketHeader*>(plan.packet);
    const auto* rows = reinterpret_cast<const StepRow*>(plan.packet + header->rows_offset);
    live.clear();
    for (int32_t i = 0; i < header->num_rows; ++i) live.push_back(rows[i].row);
  }
  auto* results = reinterpret_cast<ResultRow*>(plan.result + sizeof(ResultHeader));
  for (int32_t i = 0; i < plan.num_sampled; ++i) results[i] = {live[i], 1000 + i, -1.0f, 1, 0, 0};
  auto* header = reinterpret_cast<ResultHeader*>(plan.result);
  header->num_sampled = plan.num_sampled;
  std::atomic_ref<int64_t>(header->step).store(plan.step, std::memory_order_release);
}

double microseconds(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double, std::micro>(end - begin).count();
}

Timing measure(int32_t num_rows, int32_t num_steps) {
  Ledger ledger(bench_config(num_rows, num_steps));
  SamplingSpec spec;
  spec.stop_ids = {0, 2};
  for (int32_t i = 0; i < num_rows; ++i) ledger.add(std::vector<int32_t>(kPromptLen, 7), spec, num_steps + 60);

  Timing timing;
  timing.plan_us.reserve(num_steps);
  timing.commit_us.reserve(num_steps);
  timing.total_us.reserve(num_steps);
  timing.packet_us.reserve(num_steps);
  CommitRecord changes;
  std::vector<int32_t> live;
  constexpr int32_t kNumWarmup = 20;
  publish(*ledger.plan(), live);
  for (int32_t step = -kNumWarmup; step < num_steps; ++step) {
    const int64_t allocations_before = checks::num_allocations();
    const auto begin = Clock::now();
    const auto plan = ledger.plan();
    const auto planned = Clock::now();
    ledger.commit(changes);
    const auto committed = Clock::now();
    const int64_t num_new = checks::num_allocations() - allocations_before;
    publish(*plan, live);
    if (step < 0) continue;
    timing.plan_us.push_back(microseconds(begin, planned));
    timing.commit_us.push_back(microseconds(planned, committed));
    timing.total_us.push_back(microseconds(begin, committed));
    if (plan->packet != nullptr) timing.packet_us.push_back(timing.total_us.back());
    timing.num_allocations += num_new;
  }
  return timing;
}

}  // namespace
}  // namespace headway

int main(int argc, char** argv) {
  const int32_t num_steps = argc > 1 ? std::atoi(argv[1]) : 2000;
  int64_t total_allocations = 0;
  std::string cells;
  std::printf("%6s %9s %10s %9s %15s %13s\n", "rows", "plan us", "commit us", "step us", "packet step us",
              "packets/step");
  for (const int32_t num_rows : {1, 16, 256, 1024, 4096}) {
    const auto timing = headway::measure(num_rows, num_steps);
    const double plan_us = headway::median(timing.plan_us);
    const double commit_us = headway::median(timing.commit_us);
    const double step_us = headway::median(timing.total_us);
    const double packet_us = headway::median(timing.packet_us);
    const double packets = static_cast<double>(timing.packet_us.size()) / num_steps;
    total_allocations += timing.num_allocations;
    std::printf("%6d %9.2f %10.2f %9.2f %15.2f %13.3f\n", num_rows, plan_us, commit_us, step_us, packet_us, packets);
    char cell[200];
    std::snprintf(cell, sizeof(cell),
                  "%s{\"rows\": %d, \"plan_us\": %.2f, \"commit_us\": %.2f, \"step_us\": %.2f, "
                  "\"packet_step_us\": %.2f, \"packets_per_step\": %.4f}",
                  cells.empty() ? "" : ", ", num_rows, plan_us, commit_us, step_us, packet_us, packets);
    cells += cell;
  }
  std::printf("{\"benchmark\": \"ledger\", \"steps\": %d, \"allocations\": %lld, \"results\": [%s]}\n", num_steps,
              static_cast<long long>(total_allocations), cells.c_str());
  return total_allocations != 0;
}
