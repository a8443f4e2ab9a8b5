#include "tests/check.h"

#include <exception>

namespace headway::checks {

std::vector<CheckCase>& check_cases() {
  static std::vector<CheckCase> cases;
  return cases;
}

bool register_check(const char* name, void (*body)()) {
  check_cases().push_back({name, body});
  return true;
}

std::vector<CheckResult> run_checks(const std::string& filter) {
  std::vector<CheckResult> results;
  for (const CheckCase& check : check_cases()) {
    if (check.name.find(filter) == std::string::npos) continue;
    std::string message;
    try {
      check.body();
    } catch (const std::exception& error) {
      message = error.what();
    }
    results.push_back({check.name, message.empty(), message});
  }
  return results;
}

}  // namespace headway::checks
