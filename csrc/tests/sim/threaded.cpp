// The engine's thread shares the ledger with a submitter through a lock, as the Python binding does, and the rings with
// the device through nothing but the ring entries' release and acquire. Copies to host memory and back run beside the
// steps, on a thread of their own.
#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "tests/check.h"
#include "tests/sim/trace.h"

namespace headway::sim {
namespace {

// Carries out one piece of work after another on a thread of its own.
template <typename Work>
class Worker {
 public:
  template <typename Run>
  explicit Worker(Run&& run) : thread_([this, run = std::forward<Run>(run)]() mutable { serve(run); }) {}
  ~Worker() { stop(); }

  void push(const Work& work) {
    const std::lock_guard lock(mutex_);
    queue_.push_back(work);
    wake_.notify_one();
  }
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      is_stopping_ = true;
      wake_.notify_one();
    }
    if (thread_.joinable()) thread_.join();
  }

 private:
  template <typename Run>
  void serve(Run& run) {
    while (true) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return is_stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const Work work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      run(work);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Work> queue_;
  bool is_stopping_ = false;
  std::thread thread_;
};

// Steps on one thread, copies to host memory on another and copies back on a third: where two touch one block or slot
// at a time, the sanitizer says so.
class DeviceThreads {
 public:
  DeviceThreads(const LedgerConfig& config, uint64_t seed)
      : device_(config),
        steps_([this, rng = Rng(seed)](const Plan& plan) mutable { run(plan, rng); }),
        loads_([this, rng = Rng(seed + 1)](const Transfer& transfer) mutable { copy(transfer, rng); }),
        saves_([this, rng = Rng(seed + 2)](const Transfer& transfer) mutable { copy(transfer, rng); }) {}

  void launch(const Plan& plan) { steps_.push(plan); }
  void begin(const Transfer& transfer) { (transfer.is_out ? saves_ : loads_).push(transfer); }
  int64_t num_copied(bool is_out) const { return is_out ? num_saved_ : num_loaded_; }
  // What the device saw; valid once its threads are gone.
  const std::string& stop() {
    steps_.stop();
    loads_.stop();
    saves_.stop();
    return device_.fault();
  }

 private:
  static void dawdle(Rng& rng) {
    for (int32_t i = rng.draw(0, 3); i > 0; --i) std::this_thread::yield();
  }
  void run(const Plan& plan, Rng& rng) {
    device_.launch(plan);
    do {
      dawdle(rng);
    } while (device_.advance() && device_.num_pending() > 0);
  }
  void copy(const Transfer& transfer, Rng& rng) {
    device_.begin(transfer);
    dawdle(rng);
    device_.run_transfer(transfer.is_out);
    ++(transfer.is_out ? num_saved_ : num_loaded_);
  }

  Device device_;
  std::atomic<int64_t> num_loaded_ = 0;
  std::atomic<int64_t> num_saved_ = 0;
  Worker<Plan> steps_;
  Worker<Transfer> loads_;
  Worker<Transfer> saves_;
};

class ThreadedHost {
 public:
  ThreadedHost(const LedgerConfig& config, uint64_t seed)
      : ledger_(config), client_(ledger_, tally_), device_(config, seed) {}

  void submit(Rng rng, int32_t num_requests) {
    for (int32_t i = 1; i <= num_requests; ++i) {
      {
        const std::lock_guard lock(mutex_);
        RequestSpec request = random_request(rng, ledger_.config(), i);
        begin_like(rng, ledger_.config(), client_.tokens_of_one(rng), request);
        client_.add(request);
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
    for (const bool is_out : {false, true}) {
      for (; num_finished_[is_out] < device_.num_copied(is_out); ++num_finished_[is_out]) {
        ledger_.finish_transfer(is_out);
      }
    }
    if (const auto plan = ledger_.plan()) device_.launch(*plan);
    for (const Transfer* transfer; (transfer = ledger_.next_transfer()) != nullptr; ++num_begun_) {
      device_.begin(*transfer);
    }
    if (ledger_.commit(changes_)) client_.receive(changes_, ledger_.record(changes_.step).num_sampled);
    ledger_.check_integrity();
    const bool is_copying = num_finished_[0] + num_finished_[1] < num_begun_;
    return ledger_.has_unfinished() || ledger_.num_in_flight() > 0 || is_copying || !was_all_submitted;
  }

  std::mutex mutex_;
  Tally tally_;
  Ledger ledger_;
  Client client_;
  CommitRecord changes_;
  int64_t num_begun_ = 0;  // copies
  std::array<int64_t, 2> num_finished_ = {};  // back, out
  std::atomic<bool> is_all_submitted_ = false;
  DeviceThreads device_;
};

}  // namespace

void run_threaded_trace(uint64_t seed, TraceCounts& counts) {
  Rng rng(seed);
  const LedgerConfig config = random_config(rng);
  const int32_t num_requests = rng.draw(1, 32);
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
  add_up(host.ledger().prefix_stats(), counts.prefix);
  add_up(host.tally(), counts.tally);
}

}  // namespace headway::sim
