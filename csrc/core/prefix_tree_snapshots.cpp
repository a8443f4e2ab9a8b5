// The tree's state snapshots: who owns which, and which goes first.
#include <utility>

#include "core/prefix_tree.h"

namespace headway {
namespace {

constexpr int32_t kNumWeighed = 8;  // snapshots that are compared by cost, oldest first

}  // namespace

bool PrefixTree::evict_snapshot(int32_t spared_node) {
  const int32_t index = pick_snapshot(spared_node);
  if (index == 0) return false;
  ++num_evicted_snapshots_;
  drop_snapshot(index, snapshots_[index].last_step);
  return true;
}

// Of those that no launched step reads: the oldest, or of the oldest few the one that saves the fewest tokens.
int32_t PrefixTree::pick_snapshot(int32_t spared_node) const {
  int32_t best = 0;
  int32_t num_weighed = 0;
  for (int32_t i = snapshots_[0].newer; i != 0; i = snapshots_[i].newer) {
    if (snapshots_[i].node == spared_node || !clock_.has_retired(snapshots_[i].last_step)) continue;
    if (!weighs_cost_) return i;
    if (best == 0 || num_tokens_saved(i) < num_tokens_saved(best)) best = i;
    if (++num_weighed == kNumWeighed) break;
  }
  return best;
}

// Snapshots are of one size, so their cost differs by what is computed again without them: the way from the next one.
int32_t PrefixTree::num_tokens_saved(int32_t index) const {
  const int32_t node = snapshots_[index].node;
  int32_t above = nodes_[node].parent;
  while (above > 0 && nodes_[above].snapshot == 0) above = nodes_[above].parent;
  return nodes_[node].end - end(above);
}

bool PrefixTree::attach_snapshot(int32_t id, SlotTicket& ticket, bool has_log) {
  if (nodes_[id].snapshot != 0 || nodes_[id].is_detached) return false;
  if (free_snapshot_ == 0 && !evict_snapshot()) return false;
  const int32_t index = free_snapshot_;
  Snapshot& added = snapshots_[index];
  free_snapshot_ = added.older;
  added.ticket = std::move(ticket);
  added.node = id;
  added.has_log = has_log;
  added.last_step = 0;
  link_snapshot(index);
  nodes_[id].snapshot = index;
  ++num_snapshots_;
  ++version_;
  return true;
}

int32_t PrefixTree::read_snapshot(int32_t id, int64_t step) {
  const int32_t index = nodes_[id].snapshot;
  unlink_snapshot(index);
  link_snapshot(index);
  snapshots_[index].last_step = step;
  return snapshots_[index].ticket.slot();
}

SlotTicket PrefixTree::take_snapshot(int32_t id) {
  const int32_t index = nodes_[id].snapshot;
  SlotTicket ticket = std::move(snapshots_[index].ticket);
  drop_snapshot(index, clock_.retired);
  return ticket;
}

void PrefixTree::drop_snapshot(int32_t index, int64_t last_step) {
  Snapshot& snapshot = snapshots_[index];
  snapshot.ticket.release(last_step);
  nodes_[snapshot.node].snapshot = 0;
  unlink_snapshot(index);
  snapshot.node = 0;
  snapshot.older = free_snapshot_;
  free_snapshot_ = index;
  --num_snapshots_;
  ++version_;
}

void PrefixTree::link_snapshot(int32_t index) {
  Snapshot& ends = snapshots_[0];
  snapshots_[index].older = ends.older;
  snapshots_[index].newer = 0;
  snapshots_[ends.older].newer = index;
  ends.older = index;
}

void PrefixTree::unlink_snapshot(int32_t index) {
  const Snapshot& snapshot = snapshots_[index];
  snapshots_[snapshot.older].newer = snapshot.newer;
  snapshots_[snapshot.newer].older = snapshot.older;
}

}  // namespace headway
