#include "core/ring.h"

#include <atomic>
#include <cstring>
#include <new>
#include <string>

#include "core/error.h"

namespace headway {
namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

void EntryRing::Free::operator()(uint8_t* memory) const {
  ::operator delete(memory, kAlignment);
}

EntryRing::EntryRing(const char* name, uint8_t* memory, int64_t entry_bytes, int32_t num_entries)
    : entry_bytes_(entry_bytes), num_entries_(num_entries), memory_(memory) {
  const auto address = reinterpret_cast<intptr_t>(memory);
  if (address % static_cast<intptr_t>(kAlignment) != 0) throw RequestError(name, address, "64-byte aligned");
  if (memory != nullptr) return;
  owned_.reset(static_cast<uint8_t*>(::operator new(entry_bytes * num_entries, kAlignment)));
  memory_ = owned_.get();
}

// No step is 0, so a cleared header is the entry of no step.
ResultRing::ResultRing(const LedgerConfig& config, uint8_t* memory)
    : max_results_(config.max_results()),
      max_logprobs_(config.max_logprobs),
      ring_("result_ring_address", memory, config.result_entry_bytes(), config.max_in_flight()) {
  for (int32_t i = 0; i < config.max_in_flight(); ++i) std::memset(ring_.entry(i), 0, sizeof(ResultHeader));
}

bool ResultRing::is_published(int64_t step) const {
  auto* header = reinterpret_cast<ResultHeader*>(ring_.entry(step));
  return std::atomic_ref<int64_t>(header->step).load(std::memory_order_acquire) == step;
}

ResultView ResultRing::view(int64_t step) const {
  const uint8_t* entry = ring_.entry(step);
  const auto* rows = reinterpret_cast<const ResultRow*>(entry + sizeof(ResultHeader));
  const auto* top_ids = reinterpret_cast<const int32_t*>(rows + max_results_);
  const auto* top_logprobs = reinterpret_cast<const float*>(top_ids + int64_t{max_results_} * max_logprobs_);
  return {reinterpret_cast<const ResultHeader*>(entry), rows, top_ids, top_logprobs};
}

}  // namespace headway
