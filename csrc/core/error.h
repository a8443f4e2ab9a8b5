// The core's exceptions. The binding turns them into the Python types of headway/errors.py that bear the same names.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace headway {

// A setting or a request's parameter is out of range. Reads as "<parameter> must be <limit>, got <value>".
class RequestError : public std::invalid_argument {
 public:
  RequestError(std::string parameter, int64_t value, std::string limit, std::string hint = "")
      : std::invalid_argument(parameter + " must be " + limit + ", got " + std::to_string(value)),
        parameter_(std::move(parameter)),
        value_(value),
        limit_(std::move(limit)),
        hint_(std::move(hint)) {}

  const std::string& parameter() const { return parameter_; }
  int64_t value() const { return value_; }
  const std::string& limit() const { return limit_; }
  const std::string& hint() const { return hint_; }

 private:
  std::string parameter_;
  int64_t value_;
  std::string limit_;
  std::string hint_;
};

// Valid, but larger than this ledger can ever hold; the hint names the setting to change.
class CapacityError : public RequestError {
 public:
  using RequestError::RequestError;
};

// Host and device disagree, or an invariant is broken: our own bug. The ledger must not be used afterwards.
class IntegrityError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

inline void require_integrity(bool holds, const char* what) {
  if (!holds) throw IntegrityError(what);
}

}  // namespace headway
