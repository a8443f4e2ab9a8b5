// The two rings between host and device: packets out, results in. Entry of step s: s % max_in_flight, so an entry is
// used again only when its step has been committed. Memory is given (pinned) or plain and owned.
#pragma once

#include <cstdint>
#include <memory>

#include "core/types.h"

namespace headway {

class EntryRing {
 public:
  // memory: num_entries x entry_bytes, 64-byte aligned, or null to allocate it here.
  EntryRing(const char* name, uint8_t* memory, int64_t entry_bytes, int32_t num_entries);

  uint8_t* entry(int64_t step) const { return memory_ + step % num_entries_ * entry_bytes_; }

 private:
  struct Free {
    void operator()(uint8_t* memory) const;
  };
  int64_t entry_bytes_;
  int32_t num_entries_;
  std::unique_ptr<uint8_t, Free> owned_;
  uint8_t* memory_;
};

// One entry of the result ring, once it is published.
struct ResultView {
  const ResultHeader* header;
  const ResultRow* rows;      // [max_results]
  const int32_t* top_ids;     // [max_results, max_logprobs]
  const float* top_logprobs;  // [max_results, max_logprobs]
};

class ResultRing {
 public:
  ResultRing(const LedgerConfig& config, uint8_t* memory);

  uint8_t* entry(int64_t step) const { return ring_.entry(step); }
  bool is_published(int64_t step) const;
  ResultView view(int64_t step) const;

 private:
  int32_t max_results_;
  int32_t max_logprobs_;
  EntryRing ring_;
};

}  // namespace headway
