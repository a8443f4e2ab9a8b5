// Rows: the stable index of a request on the device, from admission to release, and the memory it holds there.
// Struct of arrays by row id 1..max_rows. Keeps the order in which rows run; decides nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "core/block_pool.h"
#include "core/fenced_pool.h"
#include "core/request.h"
#include "core/slot_pool.h"

namespace headway {

// What a row has when it is admitted.
struct RowStart {
  int32_t num_tokens = 0;           // computed already
  SlotTicket slot = {};             // where its state goes
  std::span<const int32_t> blocks;  // of those tokens; their references become the row's
};

class RowTable {
 public:
  RowTable(const LedgerConfig& config, const StepClock& clock, BlockPool& blocks);

  bool has_room() const { return ids_.num_free() > 0; }

  // Takes a row for a request, which starts as a prompt of all its known tokens. Needs has_room().
  int32_t admit(Request& request, RowStart&& start);

  // Gives back row, slot and blocks; each becomes free when the last launched step of the row has retired.
  void release(int32_t row);

  void grant(int32_t row);  // one more block; needs a free one
  void pause(int32_t row);
  void resume(int32_t row);
  void retire(int64_t step) { ids_.retire(step); }

  // The row goes on as a sequence of num_tokens known tokens, at least min_rewound_len(). What was launched beyond is
  // void, and its blocks stay granted.
  void rewind(int32_t row, int32_t num_tokens);
  // The shortest sequence that the row's KV and state can go on from. As for lengths, of the state's base the host
  // knows the bound: where the device has stopped before, it is lower.
  int32_t min_rewound_len(int32_t row) const;
  // What the next packet must tell the device.
  const std::vector<RowRewind>& rewinds() const { return rewinds_; }
  void clear_rewinds() { rewinds_.clear(); }

  // The step computes num_tokens of the row and, when is_sampled, one sample more will come.
  void advance(int32_t row, int64_t step, int32_t num_tokens, bool is_sampled) {
    const int32_t start = launched_len_[row];
    launched_len_[row] = start + num_tokens;
    state_base_[row] =
        is_decoding_[row] ? next_state_base(state_base_[row], start, start + num_tokens, window_) : start + num_tokens;
    newest_len_[row] = std::max(newest_len_[row], start + num_tokens);
    bound_len_[row] += is_sampled;
    is_decoding_[row] = is_sampled;
    last_step_[row] = step;
  }

  Request* request(int32_t row) const { return requests_[row]; }  // null for a row that nobody holds
  // Tokens whose computation has been launched: the next position to compute.
  int32_t launched_len(int32_t row) const { return launched_len_[row]; }
  // Known tokens and launched samples: the sequence's length once all results are there, if it does not stop before.
  int32_t bound_len(int32_t row) const { return bound_len_[row]; }
  // Tokens that the row's blocks hold; unlimited in a model without attention.
  int32_t capacity(int32_t row) const { return capacity_[row]; }
  bool is_decoding(int32_t row) const { return is_decoding_[row]; }
  bool has_mask(int32_t row) const { return has_mask_[row]; }  // of the tokens that may be sampled
  // All samples the request may take are launched: nothing is left to plan.
  bool is_exhausted(int32_t row) const { return bound_len_[row] >= max_total_len_[row]; }
  int32_t state_base(int32_t row) const { return state_base_[row]; }
  int64_t last_step(int32_t row) const { return last_step_[row]; }
  int32_t slot(int32_t row) const { return tickets_[row].slot(); }
  SlotTicket& slot_ticket(int32_t row) { return tickets_[row]; }
  const std::vector<int32_t>& blocks(int32_t row) const { return blocks_[row]; }

  const std::vector<int32_t>& running() const { return running_; }  // those that run first come first
  const std::vector<int32_t>& paused() const { return paused_; }
  const FencedPool& ids() const { return ids_; }
  int32_t num_rows() const { return ids_.num_total(); }

 private:
  void insert_running(int32_t row);
  void erase_running(int32_t row);
  std::vector<int32_t>::iterator find_place(int32_t row);
  void forget_rewind(int32_t row);

  const int32_t block_size_;
  const bool has_blocks_;
  const bool has_slots_;
  const StateWindow window_;
  BlockPool& block_pool_;
  FencedPool ids_;
  std::vector<Request*> requests_;
  std::vector<int32_t> launched_len_;
  std::vector<int32_t> bound_len_;
  std::vector<int32_t> newest_len_;  // launched_len_ at its largest: logs still hold what was computed then
  std::vector<int32_t> state_base_;
  std::vector<int32_t> max_total_len_;
  std::vector<int32_t> capacity_;
  std::vector<uint8_t> is_decoding_;
  std::vector<uint8_t> has_mask_;
  std::vector<int64_t> last_step_;
  std::vector<SlotTicket> tickets_;
  std::vector<std::vector<int32_t>> blocks_;  // a released row's list stays until the row is taken again
  std::vector<int32_t> running_;
  std::vector<int32_t> paused_;
  std::vector<RowRewind> rewinds_;
};

}  // namespace headway
