// A small test list in the manner of gtest. Cases register themselves; pytest runs the list through the `_core` module
// and a sanitizer binary runs it alone.
#pragma once

#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace headway::checks {

struct CheckCase {
  std::string name;
  std::function<void()> body;
};

struct CheckResult {
  std::string name;
  bool has_passed;
  std::string message;
};

std::vector<CheckCase>& check_cases();
bool register_check(const char* name, void (*body)());
std::vector<CheckResult> run_checks(const std::string& filter);

class CheckFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <typename A, typename B>
void expect_equal(const A& a, const B& b, const char* what, const char* file, int line) {
  if (a == b) return;
  std::ostringstream message;
  message << file << ":" << line << ": " << what << ": " << a << " != " << b;
  throw CheckFailure(message.str());
}

inline void expect_true(bool holds, const char* what, const char* file, int line) {
  if (!holds) throw CheckFailure(std::string(file) + ":" + std::to_string(line) + ": not true: " + what);
}

template <typename Error, typename Body>
Error expect_throw(Body&& body, const char* what, const char* file, int line) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  throw CheckFailure(std::string(file) + ":" + std::to_string(line) + ": no " + what + " was thrown");
}

}  // namespace headway::checks

#define CHECK_CASE(name)                                                                                  \
  static void name();                                                                                     \
  [[maybe_unused]] static const bool name##_is_registered = headway::checks::register_check(#name, name); \
  static void name()
#define EXPECT_EQ(a, b) headway::checks::expect_equal(a, b, #a " == " #b, __FILE__, __LINE__)
#define EXPECT_TRUE(a) headway::checks::expect_true(static_cast<bool>(a), #a, __FILE__, __LINE__)
#define EXPECT_THROW(body, Error) headway::checks::expect_throw<Error>([&] { body; }, #Error, __FILE__, __LINE__)
