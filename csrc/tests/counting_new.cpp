#include "tests/counting_new.h"

#include <cstdlib>
#include <new>

namespace {

int64_t num_counted = 0;
int64_t num_left = 0;

}  // namespace

void* operator new(size_t num_bytes) {
  ++num_counted;
  if (num_left > 0 && --num_left == 0) throw std::bad_alloc();
  if (void* memory = std::malloc(num_bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}

namespace headway::checks {

int64_t num_allocations() {
  return num_counted;
}
void fail_allocation(int64_t num_until_failure) {
  num_left = num_until_failure;
}

}  // namespace headway::checks
