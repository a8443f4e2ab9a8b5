// Open addressing from hash values to the ids of tree nodes. Several nodes may share a value: whoever asks compares
// what the value was made of. Knows nothing of nodes. All memory is had at construction.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace headway {

class NodeMap {
 public:
  explicit NodeMap(int32_t max_nodes) : entries_(std::bit_ceil(2 * static_cast<uint32_t>(max_nodes) + 2)) {}

  // The first node under `tag` for which is_match(node) holds, or 0.
  template <typename IsMatch>
  int32_t find(uint32_t tag, IsMatch&& is_match) const {
    for (uint32_t i = home(tag); entries_[i].node != 0; i = next(i)) {
      if (entries_[i].tag == tag && is_match(entries_[i].node)) return entries_[i].node;
    }
    return 0;
  }

  void insert(uint32_t tag, int32_t node) {
    uint32_t i = home(tag);
    while (entries_[i].node != 0) i = next(i);
    entries_[i] = {tag, node};
    ++num_entries_;
  }

  // False when it is not there. Entries behind the gap move up, so that no search ends early.
  bool erase(uint32_t tag, int32_t node) {
    uint32_t gap = home(tag);
    while (entries_[gap].node != node) {
      if (entries_[gap].node == 0) return false;
      gap = next(gap);
    }
    for (uint32_t i = next(gap); entries_[i].node != 0; i = next(i)) {
      const uint32_t num_from_home = (i - home(entries_[i].tag)) & mask();
      if (num_from_home < ((i - gap) & mask())) continue;
      entries_[gap] = entries_[i];
      gap = i;
    }
    entries_[gap] = {};
    --num_entries_;
    return true;
  }

  void prefetch(uint32_t tag) const { __builtin_prefetch(&entries_[home(tag)]); }
  int32_t num_entries() const { return num_entries_; }

 private:
  struct Entry {
    uint32_t tag = 0;
    int32_t node = 0;  // 0: empty
  };

  uint32_t mask() const { return static_cast<uint32_t>(entries_.size()) - 1; }
  uint32_t home(uint32_t tag) const { return tag & mask(); }
  uint32_t next(uint32_t i) const { return (i + 1) & mask(); }

  std::vector<Entry> entries_;  // a power of two, at most half full
  int32_t num_entries_ = 0;
};

}  // namespace headway
