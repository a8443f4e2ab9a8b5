// The number of threads kernels may use, set by whoever owns the process's threads (torch, through the ops).
#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>

namespace headway::cpu {
namespace {

std::atomic<int>& thread_count() {
  static std::atomic<int> count{1};
  return count;
}

}  // namespace

int num_threads() {
  return thread_count().load(std::memory_order_relaxed);
}
void set_num_threads(int count) {
  thread_count().store(std::max(1, count), std::memory_order_relaxed);
}

}  // namespace headway::cpu
