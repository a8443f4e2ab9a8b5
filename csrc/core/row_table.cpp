#include "core/row_table.h"

#include <algorithm>
#include <limits>

namespace headway {

RowTable::RowTable(const LedgerConfig& config, const StepClock& clock, BlockPool& blocks)
    : block_size_(config.block_size),
      has_blocks_(config.num_blocks > 0),
      has_slots_(config.num_slots > 0),
      window_(config.state_window),
      block_pool_(blocks),
      ids_(config.max_rows, config.max_in_flight(), clock),
      requests_(config.max_rows + 1, nullptr),
      launched_len_(config.max_rows + 1, 0),
      bound_len_(config.max_rows + 1, 0),
      newest_len_(config.max_rows + 1, 0),
      state_base_(config.max_rows + 1, 0),
      max_total_len_(config.max_rows + 1, 0),
      capacity_(config.max_rows + 1, 0),
      is_decoding_(config.max_rows + 1, 0),
      has_mask_(config.max_rows + 1, 0),
      last_step_(config.max_rows + 1, 0),
      tickets_(config.max_rows + 1),
      blocks_(config.max_rows + 1) {
  for (auto& table : blocks_) table.reserve(config.max_blocks_per_row());
  running_.reserve(config.max_rows);
  paused_.reserve(config.max_rows);
  rewinds_.reserve(config.max_rows);
}

int32_t RowTable::admit(Request& request, RowStart&& start) {
  const int32_t row = ids_.take();
  tickets_[row] = std::move(start.slot);
  requests_[row] = &request;
  launched_len_[row] = newest_len_[row] = state_base_[row] = start.num_tokens;
  bound_len_[row] = request.num_tokens();
  max_total_len_[row] = request.max_total_len;
  const auto num_held = static_cast<int32_t>(start.blocks.size()) * block_size_;
  capacity_[row] = has_blocks_ ? num_held : std::numeric_limits<int32_t>::max();
  is_decoding_[row] = false;
  has_mask_[row] = !request.token_mask.empty();
  request.is_mask_sent = false;
  last_step_[row] = 0;
  blocks_[row].assign(start.blocks.begin(), start.blocks.end());
  request.row = row;
  request.state = RequestState::kRunning;
  insert_running(row);
  return row;
}

void RowTable::release(int32_t row) {
  Request& request = *requests_[row];
  if (request.state == RequestState::kPaused) {
    std::erase(paused_, row);
  } else {
    erase_running(row);
  }
  const int64_t last_step = last_step_[row];
  for (const int32_t block : blocks_[row]) block_pool_.release(block, last_step);
  tickets_[row].release(last_step);
  ids_.release(row, last_step);
  forget_rewind(row);
  requests_[row] = nullptr;
  request.row = kDummyRow;
  request.last_step = last_step;
}

void RowTable::grant(int32_t row) {
  blocks_[row].push_back(block_pool_.acquire());
  capacity_[row] += block_size_;
}

void RowTable::pause(int32_t row) {
  erase_running(row);
  paused_.push_back(row);
  requests_[row]->state = RequestState::kPaused;
}

void RowTable::resume(int32_t row) {
  std::erase(paused_, row);
  insert_running(row);
  requests_[row]->state = RequestState::kRunning;
}

void RowTable::rewind(int32_t row, int32_t num_tokens) {
  bound_len_[row] = num_tokens;
  if (launched_len_[row] < num_tokens) return;  // the device has not come that far
  launched_len_[row] = num_tokens - 1;
  is_decoding_[row] = true;
  forget_rewind(row);
  rewinds_.push_back({row, num_tokens - 1, requests_[row]->tokens[num_tokens - 1], 0});
}

// A state kept in place has seen every token that was launched; over a window it goes back to its base, and no further
// than the log keeps inputs. KV can be cut anywhere, but what was computed as a prompt stays as it is.
int32_t RowTable::min_rewound_len(int32_t row) const {
  if (!has_slots_) return 1 + requests_[row]->prompt_len;
  if (window_.num_tokens == 0) return 1 + launched_len_[row];
  return 1 + std::max(state_base_[row], newest_len_[row] - window_.max_rewind);
}

void RowTable::forget_rewind(int32_t row) {
  std::erase_if(rewinds_, [row](const RowRewind& rewind) { return rewind.row == row; });
}

void RowTable::insert_running(int32_t row) {
  running_.insert(find_place(row), row);
}

void RowTable::erase_running(int32_t row) {
  running_.erase(find_place(row));
}

std::vector<int32_t>::iterator RowTable::find_place(int32_t row) {
  const auto runs_before = [this](int32_t a, int32_t b) { return RunsBefore{}(requests_[a], requests_[b]); };
  return std::lower_bound(running_.begin(), running_.end(), row, runs_before);
}

}  // namespace headway
