// The order in which elements of an array were used last: a list through their own `older` and `newer` links, by
// index. Index 0 is nobody. Knows nothing of what the elements are.
#pragma once

#include <cstdint>
#include <vector>

namespace headway {

template <typename Element>
class UseOrder {
 public:
  explicit UseOrder(std::vector<Element>& elements) : elements_(elements) {}

  int32_t oldest() const { return oldest_; }
  int32_t next(int32_t i) const { return elements_[i].newer; }
  int32_t size() const { return size_; }

  // The element, which is in no list, becomes the newest.
  void push(int32_t i) {
    elements_[i].older = newest_;
    elements_[i].newer = 0;
    (newest_ != 0 ? elements_[newest_].newer : oldest_) = i;
    newest_ = i;
    ++size_;
  }

  void remove(int32_t i) {
    const Element& removed = elements_[i];
    (removed.older != 0 ? elements_[removed.older].newer : oldest_) = removed.newer;
    (removed.newer != 0 ? elements_[removed.newer].older : newest_) = removed.older;
    --size_;
  }

 private:
  std::vector<Element>& elements_;
  int32_t oldest_ = 0;
  int32_t newest_ = 0;
  int32_t size_ = 0;
};

}  // namespace headway
