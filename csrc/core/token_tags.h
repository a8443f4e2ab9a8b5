// Hash values of token sequences, block by block: what the nodes of a prefix tree are found by. Each depends on all
// tokens before it, through the value before it. Values may collide: whoever finds something compares the tokens.
// Knows nothing of nodes.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "core/node_map.h"

namespace headway {

// Nobody outside can choose tokens whose values collide: the seed is drawn at construction.
class TokenTags {
 public:
  explicit TokenTags(uint32_t mask);  // fewer bits make values collide

  uint32_t after(uint32_t tag, std::span<const int32_t> tokens) const;

 private:
  const uint64_t seed_;
  const uint32_t mask_;
};

// The values of a sequence's full blocks, one after another. They follow from the tokens alone, so some are made ahead
// of who asks: memory has the map's entries at hand by then.
class TagsAhead {
 public:
  // `tokens` begin behind those that `tag` is of.
  TagsAhead(const TokenTags& tags, const NodeMap& map, uint32_t tag, std::span<const int32_t> tokens,
            int32_t block_size)
      : tags_(tags), map_(map), tokens_(tokens), block_size_(block_size), newest_(tag) {
    for (int32_t i = 0; i < kNumAhead; ++i) make_one();
  }

  bool has_next() const { return num_given_ < num_made_; }
  uint32_t next() {
    const uint32_t tag = ahead_[num_given_++ % kNumAhead];
    make_one();
    return tag;
  }

 private:
  static constexpr int32_t kNumAhead = 8;  // at some 15 ns a block: what a trip to memory takes

  void make_one() {
    if (tokens_.size() < static_cast<size_t>(block_size_)) return;
    newest_ = tags_.after(newest_, tokens_.first(block_size_));
    tokens_ = tokens_.subspan(block_size_);
    ahead_[num_made_++ % kNumAhead] = newest_;
    map_.prefetch(newest_);
  }

  const TokenTags& tags_;
  const NodeMap& map_;
  std::span<const int32_t> tokens_;  // whose values are not made yet
  const int32_t block_size_;
  uint32_t newest_;
  uint32_t num_made_ = 0;
  uint32_t num_given_ = 0;
  std::array<uint32_t, kNumAhead> ahead_;  // a ring
};

}  // namespace headway
