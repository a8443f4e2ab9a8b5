// Philox4x32-10: a random number as a pure function of (seed, position). Salmon et al., "Parallel random numbers: as
// easy as 1, 2, 3" (SC 2011).
#pragma once

#include <cstdint>

namespace headway::cpu {

// u in [0, 1) with 24 bits: the first word of Philox(key = seed, counter = (position, 0, 0, 0)).
inline float philox_uniform(uint64_t seed, uint32_t position) {
  uint32_t counter[4] = {position, 0, 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t second = uint64_t{0xCD9E8D57u} * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(second),
                              static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(first)};
    for (int word = 0; word < 4; ++word) counter[word] = next[word];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return static_cast<float>(counter[0] >> 8) * 0x1p-24f;
}

}  // namespace headway::cpu
