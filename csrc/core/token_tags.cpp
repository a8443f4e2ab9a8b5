#include "core/token_tags.h"

#include <cstring>
#include <random>

namespace headway {
namespace {

uint64_t random_seed() {
  std::random_device device;
  return (uint64_t{device()} << 32 | device()) | 1;
}

// As wyhash mixes (Wang Yi, 2019).
uint64_t fold(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

}  // namespace

TokenTags::TokenTags(uint32_t mask) : seed_(random_seed()), mask_(mask) {}

// What came before is mixed in last, so that the blocks of a sequence are hashed side by side.
uint32_t TokenTags::after(uint32_t tag, std::span<const int32_t> tokens) const {
  uint64_t hash = seed_;
  size_t i = 0;
  for (; i + 4 <= tokens.size(); i += 4) {
    uint64_t words[2];
    std::memcpy(words, &tokens[i], sizeof(words));
    hash = fold(hash ^ words[0] ^ 0xa0761d6478bd642fu, words[1] ^ seed_);
  }
  for (; i < tokens.size(); ++i) hash = fold(hash ^ static_cast<uint32_t>(tokens[i]), seed_ ^ 0xe7037ed1a0b428dbu);
  hash ^= uint64_t{tag} << 32 | tokens.size();
  return static_cast<uint32_t>(fold(hash ^ 0x9e3779b97f4a7c15u, seed_)) & mask_;
}

}  // namespace headway
