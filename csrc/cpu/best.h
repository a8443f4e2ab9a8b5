// The k best of many values without sorting them all: candidates above a rising threshold, thinned when they overflow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "cpu/simd.h"

namespace headway::cpu::HEADWAY_SIMD {

struct Candidate {
  float value;
  int32_t id;
};

// Best first: larger value, then lower id.
struct IsBetter {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
  }
};

class BestList {
 public:
  explicit BestList(int64_t limit) : limit_(limit), list_(new Candidate[static_cast<size_t>(2 * limit)]) {}

  // Keeps the limit best of values [count], sorted; NaN is not allowed among them.
  void collect(const float* values, int64_t count) {
    size_ = 0;
    Candidate border{0.0f, 0};
    bool has_border = false;
    for (int64_t i = 0; i < count; ++i) {
      // Ids rise, so a value equal to the border's comes after it.
      if (has_border && values[i] <= border.value) continue;
      list_[size_++] = {values[i], static_cast<int32_t>(i)};
      if (size_ == 2 * limit_) {
        std::nth_element(list_.get(), list_.get() + limit_ - 1, list_.get() + size_, IsBetter{});
        size_ = limit_;
        border = list_[limit_ - 1];
        has_border = true;
      }
    }
    std::sort(list_.get(), list_.get() + size_, IsBetter{});
    size_ = std::min(size_, limit_);
  }

  int64_t size() const { return size_; }
  const Candidate& operator[](int64_t i) const { return list_[i]; }

 private:
  int64_t limit_;
  int64_t size_ = 0;
  std::unique_ptr<Candidate[]> list_;
};

}  // namespace headway::cpu::HEADWAY_SIMD
