// Host truth against the device's mirror, field by field. For debugging: needs a mirror that stands still, which it
// does when every launched step has published its results.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "core/error.h"
#include "core/ledger.h"

namespace headway {
namespace {

[[noreturn]] void report(const char* field, int32_t row, int64_t device, int64_t host) {
  throw IntegrityError(std::string("the device's ") + field + " of row " + std::to_string(row) + " is " +
                       std::to_string(device) + ", the host's " + std::to_string(host));
}

void require_equal(const char* field, int32_t row, int64_t device, int64_t host) {
  if (device != host) report(field, row, device, host);
}

template <typename T>
void require_list(const char* field, int32_t row, const T* device, const T* host, size_t num_items) {
  for (size_t i = 0; i < num_items; ++i) {
    if (std::memcmp(device + i, host + i, sizeof(T)) == 0) continue;
    report(field, row, static_cast<int64_t>(device[i]), static_cast<int64_t>(host[i]));
  }
}

}  // namespace

// A row's sequence as the device has it: what is committed, then what the steps in flight have sampled.
struct Ledger::MirrorRow {
  std::vector<int32_t> tokens;
  bool is_stopped = false;
};

Ledger::MirrorRow Ledger::expected_row(int32_t row) const {
  const Request& request = *rows_.request(row);
  MirrorRow expected{.tokens = request.tokens};
  for (int64_t step = std::max(clock_.retired, request.void_step) + 1; step <= clock_.launched; ++step) {
    const StepRecord& launched = record(step);
    const auto found = std::find(launched.rows.begin(), launched.rows.end(), row);
    const auto i = static_cast<int32_t>(found - launched.rows.begin());
    if (i >= launched.num_sampled || expected.is_stopped) continue;
    const ResultRow& result = results_.view(step).rows[i];
    expected.tokens.push_back(result.token);
    expected.is_stopped = result.is_stopped != 0;
  }
  return expected;
}

void Ledger::check_mirror(const DeviceMirror& mirror) const {
  for (int64_t step = clock_.retired + 1; step <= clock_.launched; ++step) {
    require_integrity(results_.is_published(step), "the mirror is compared while a step runs");
  }
  for (int32_t row = 1; row <= rows_.num_rows(); ++row) {
    if (rows_.request(row) == nullptr) continue;
    check_mirror_lists(mirror, row);
    const auto is_it = [row](const RowRewind& rewind) { return rewind.row == row; };
    if (std::ranges::none_of(rows_.rewinds(), is_it)) check_mirror_place(mirror, row);  // else it is about to move
  }
  const auto& live = planner_.device_rows();
  for (size_t i = 0; i < live.size(); ++i) {
    require_equal("live list, at an entry", live[i], mirror.live[i].row, live[i]);
  }
  if (mirror.counter == nullptr || clock_.launched == 0) return;
  require_equal("step count, for want", kDummyRow, mirror.counter->step, clock_.launched);
  require_equal("number of live rows, for want", kDummyRow, mirror.counter->num_live,
                static_cast<int64_t>(live.size()));
}

// What moves with each step.
void Ledger::check_mirror_place(const DeviceMirror& mirror, int32_t row) const {
  const MirrorRow expected = expected_row(row);
  const auto num_tokens = static_cast<int32_t>(expected.tokens.size());
  const bool is_decoding = rows_.is_decoding(row);
  const int32_t num_computed = is_decoding ? num_tokens - 1 : rows_.launched_len(row);
  require_equal("num_computed", row, mirror.num_computed[row], num_computed);
  require_equal("stopped", row, mirror.stopped[row], expected.is_stopped);
  require_equal("last_token", row, mirror.last_token[row], is_decoding ? expected.tokens.back() : 0);
  // The host knows the bound: the device moves the base with tokens that it computes, not with those after a stop.
  const bool is_bound = config_.num_slots == 0 || mirror.state_base[rows_.slot(row)] <= rows_.state_base(row);
  require_equal("state base, within the host's bound or not,", row, is_bound, true);
  const int32_t begin = cache_.history_start(row);
  require_list("history", row, mirror.history + int64_t{row} * mirror.max_model_len + begin,
               expected.tokens.data() + begin, num_computed - begin);
}

// What stays from admission on, and the blocks granted since.
void Ledger::check_mirror_lists(const DeviceMirror& mirror, int32_t row) const {
  const Request& request = *rows_.request(row);
  require_equal("slot", row, mirror.slot[row], rows_.slot(row));
  const auto& blocks = rows_.blocks(row);
  require_list("block table", row, mirror.block_table + int64_t{row} * mirror.max_blocks_per_row, blocks.data(),
               blocks.size());
  const bool is_same = std::memcmp(&mirror.sampling[row], &request.sampling, offsetof(RowSampling, reserved)) == 0;
  require_equal("sampling parameters, as one number,", row, is_same, true);
  const auto& stops = request.stop_ids;
  require_list("stop ids", row, mirror.stop_ids + int64_t{row} * kMaxStopIds, stops.data(), stops.size());
  const int64_t begin = int64_t{row} * kMaxLogitBias;
  for (size_t i = 0; i < request.logit_bias.size(); ++i) {
    const auto& [token, bias] = request.logit_bias[i];
    require_list("biased tokens", row, mirror.bias_ids + begin + i, &token, 1);
    require_list("biases", row, mirror.bias_values + begin + i, &bias, 1);
  }
}

}  // namespace headway
