// The engine's thread shares the ledger with a submitter through a lock, as the Python binding does, and the rings with
// the device through nothing but the ring entries' release and acquire.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "tests/check.h"
#include "tests/sim/trace.h"

namespace headway::sim {
namespace {

class DeviceThread {
 public:
  DeviceThread(const LedgerConfig& config, uint64_t seed) : device_(config), thread_([this, seed] { run(seed); }) {}
  ~DeviceThread() { stop(); }

  void launch(const Plan& plan) {
    const std::lock_guard lock(mutex_);
    queue_.push_back(plan);
    wake_.notify_one();
  }
  // What the device saw; valid once its thread is gone.
  const std::string& stop() {
    {
      const std::lock_guard lock(mutex_);
      is_stopping_ = true;
      wake_.notify_one();
    }
    if (thread_.joinable()) thread_.join();
    return device_.fault();
  }

 private:
  void run(uint64_t seed) {
    Rng rng(seed);
    while (true) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return is_stopping_ || !queue_.empty(); });
        if (queue_.empty()) return;
        device_.launch(queue_.front());
        queue_.pop_front();
      }
      do {
        for (int32_t i = rng.draw(0, 3); i > 0; --i) std::this_thread::yield();
      } while (device_.advance() && device_.num_pending() > 0);
    }
  }

  Device device_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Plan> queue_;
  bool is_stopping_ = false;
  std::thread thread_;
};

class ThreadedHost {
 public:
  ThreadedHost(const LedgerConfig& config, uint64_t seed)
      : ledger_(config), client_(ledger_, tally_), device_(config, seed) {}

  void submit(Rng rng, int32_t num_requests) {
    for (int32_t i = 1; i <= num_requests; ++i) {
      {
        const std::lock_guard lock(mutex_);
        client_.add(random_request(rng, ledger_.config(), i));
        if (rng.one_in(4)) client_.abort(rng.draw(1, i));
        if (rng.one_in(2)) client_.rewind(rng.draw(1, i), rng.draw(0, 4));
      }
      for (int32_t k = rng.draw(0, 8); k > 0; --k) std::this_thread::yield();
    }
    is_all_submitted_ = true;
  }

  void serve() {
    while (step()) std::this_thread::yield();
  }
  const std::string& stop_device() { return device_.stop(); }
  const Client& client() const { return client_; }
  const Ledger& ledger() const { return ledger_; }
  const Tally& tally() const { return tally_; }

 private:
  bool step() {
    const bool was_all_submitted = is_all_submitted_;
    const std::lock_guard lock(mutex_);
    if (const auto plan = ledger_.plan()) device_.launch(*plan);
    if (ledger_.commit(changes_)) client_.receive(changes_, ledger_.record(changes_.step).num_sampled);
    ledger_.check_integrity();
    return !was_all_submitted || ledger_.has_unfinished() || ledger_.num_in_flight() > 0;
  }

  std::mutex mutex_;
  Tally tally_;
  Ledger ledger_;
  Client client_;
  CommitRecord changes_;
  std::atomic<bool> is_all_submitted_ = false;
  DeviceThread device_;
};

}  // namespace

void run_threaded_trace(uint64_t seed, TraceCounts& counts) {
  Rng rng(seed);
  LedgerConfig config = random_config(rng);
  config.num_host_blocks = config.num_host_slots = 0;
  const int32_t num_requests = rng.draw(1, 12);
  ThreadedHost host(config, rng.bits());
  std::thread submitter([&host, seed, num_requests] { host.submit(Rng(seed + 1), num_requests); });
  try {
    host.serve();
  } catch (...) {
    submitter.join();
    throw;
  }
  submitter.join();
  EXPECT_EQ(host.stop_device(), "");
  compare_with_serial(host.client(), config);
  ++counts.num_traces;
  ++counts.num_by_depth[config.max_launch_depth];
  counts.num_requests += host.client().newest_id();
  counts.num_steps += host.ledger().clock().launched;
  counts.num_evictions += host.ledger().stats().num_evictions;
  add_up(host.tally(), counts.tally);
}

}  // namespace headway::sim
