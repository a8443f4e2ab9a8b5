// headway_checks [filter]: the whole list without Python, for sanitizers and debuggers.
#include <cstdio>

#include "tests/check.h"

int main(int argc, char** argv) {
  int num_failed = 0;
  const auto results = headway::checks::run_checks(argc > 1 ? argv[1] : "");
  for (const auto& result : results) {
    if (result.has_passed) continue;
    ++num_failed;
    std::printf("FAILED %s: %s\n", result.name.c_str(), result.message.c_str());
  }
  std::printf("%zu checks, %d failed\n", results.size(), num_failed);
  return num_failed != 0 || results.empty();
}
