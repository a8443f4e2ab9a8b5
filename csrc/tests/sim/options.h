// Command lines of "--name integer" pairs.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <string>

namespace headway::sim {

class Options {
 public:
  // Ends the process with status 2 on a name that is not in `names` or a value that is no integer.
  Options(int argc, char** argv, std::initializer_list<const char*> names) {
    for (int i = 1; i < argc; i += 2) {
      bool is_known = false;
      for (const char* name : names) is_known |= std::strcmp(name, argv[i]) == 0;
      if (!is_known) fail(argv[i], "is not an option");
      char* end = nullptr;
      if (i + 1 < argc) values_[argv[i]] = std::strtoll(argv[i + 1], &end, 10);
      if (end == nullptr || *end != '\0' || end == argv[i + 1]) fail(argv[i], "needs an integer");
    }
  }

  bool has(const char* name) const { return values_.contains(name); }
  int64_t get(const char* name, int64_t otherwise) const { return has(name) ? values_.at(name) : otherwise; }

 private:
  [[noreturn]] static void fail(const char* name, const char* why) {
    std::fprintf(stderr, "%s %s\n", name, why);
    std::exit(2);
  }
  std::map<std::string, int64_t> values_;
};

}  // namespace headway::sim
