// One parallel region an op call. Small work stays on the calling thread: waking others costs microseconds.
#pragma once

#include <cstdint>

namespace headway::cpu {

int num_threads();
void set_num_threads(int count);

// Elements of arithmetic below which a second thread does not pay.
inline constexpr int64_t kMinParallelWork = 1 << 16;

// Calls body(item) for items 0 .. count - 1; cost is the work of all of them, in elements.
template <class Body>
void parallel_for(int64_t count, int64_t cost, const Body& body) {
#if defined(_OPENMP)
  const int threads = num_threads();
  if (count > 1 && threads > 1 && cost >= kMinParallelWork) {
    const int64_t grain = count / (int64_t{8} * threads) + 1;
#pragma omp parallel for schedule(dynamic, grain) num_threads(threads)
    for (int64_t item = 0; item < count; ++item) body(item);
    return;
  }
#endif
  for (int64_t item = 0; item < count; ++item) body(item);
  static_cast<void>(cost);
}

}  // namespace headway::cpu
