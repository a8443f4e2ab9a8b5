// The device's copies to host memory and back. Each happens at one moment between its begin and its end, which is drawn
// by whoever calls: too early or too late for a block or slot that is not the transfer's own then.
#include <algorithm>

#include "tests/sim/device.h"

namespace headway::sim {

bool Device::run_transfer(bool is_out) {
  std::deque<Transfer>& transfers = is_out ? saves_ : loads_;
  if (transfers.empty()) return false;
  const Transfer transfer = transfers.front();
  transfers.pop_front();
  std::vector<Cell>& cells = transfer.is_out ? host_cells_ : cells_;
  std::vector<State>& states = transfer.is_out ? host_states_ : states_;
  const std::vector<Cell>& other_cells = transfer.is_out ? cells_ : host_cells_;
  const std::vector<State>& other_states = transfer.is_out ? states_ : host_states_;
  for (const RecordMove& move : transfer.blocks) {
    expect(move.source != kDummyBlock && move.target != kDummyBlock, "the dummy block is moved");
    std::copy_n(&other_cells[int64_t{move.source} * config_.block_size], config_.block_size,
                &cells[int64_t{move.target} * config_.block_size]);
  }
  for (const RecordMove& move : transfer.slots) {
    expect(move.source != kDummySlot && move.target != kDummySlot, "the dummy's state is moved");
    states[move.target] = other_states[move.source];
    if (transfer.is_out) host_base_[move.target] = mirror_.state_base[move.source];
    if (!transfer.is_out) mirror_.state_base[move.target] = host_base_[move.source];
  }
  return true;
}

}  // namespace headway::sim
