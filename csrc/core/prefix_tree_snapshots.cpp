// The tree's state snapshots: who owns which, and which goes first.
#include <utility>

#include "core/prefix_tree.h"

namespace headway {
namespace {

constexpr int32_t kNumWeighed = 8;  // snapshots that are compared by cost, oldest first
constexpr int32_t kMaxNodesWalked = 128;  // to tell a cost: beyond, all are alike

}  // namespace

bool PrefixTree::evict_snapshot(int32_t spared_node) {
  const int32_t index = pick_slot(spared_node);
  if (index != 0) evict(index);
  return index != 0;
}

bool PrefixTree::evict_snapshot(SnapshotKind kind) {
  const int32_t index = pick_snapshot(kind, 0);
  if (index != 0) evict(index);
  return index != 0;
}

void PrefixTree::evict(int32_t index) {
  ++num_evicted_snapshots_;
  drop_snapshot(index, snapshots_[index].last_step);
}

int32_t PrefixTree::pick_slot(int32_t spared_node) const {
  const int32_t waypoint = pick_snapshot(SnapshotKind::kWaypoint, spared_node);
  return waypoint != 0 ? waypoint : pick_snapshot(SnapshotKind::kAnchor, spared_node);
}

// Of those that no launched step reads: the oldest, or of the oldest few the one that saves the fewest tokens. So go
// waypoints always: those of an old prompt thin out, and what is left of them still helps most.
int32_t PrefixTree::pick_snapshot(SnapshotKind kind, int32_t spared_node) const {
  const bool weighs_cost = weighs_cost_ || kind == SnapshotKind::kWaypoint;
  int32_t best = 0;
  int32_t fewest_saved = 0;
  int32_t num_weighed = 0;
  for (int32_t i = order(kind).oldest(); i != 0; i = order(kind).next(i)) {
    if (snapshots_[i].node == spared_node || !clock_.has_retired(snapshots_[i].last_step)) continue;
    if (!weighs_cost) return i;
    const int32_t num_saved = num_tokens_saved(i);
    if (best == 0 || num_saved < fewest_saved) {
      best = i;
      fewest_saved = num_saved;
    }
    if (++num_weighed == kNumWeighed) break;
  }
  return best;
}

// Snapshots are of one size, so their cost differs by what is computed again without them: the way from the next one.
int32_t PrefixTree::num_tokens_saved(int32_t index) const {
  const int32_t node = snapshots_[index].node;
  int32_t above = nodes_[node].parent;
  for (int32_t i = 0; i < kMaxNodesWalked && above > 0 && nodes_[above].snapshot == 0; ++i)
    above = nodes_[above].parent;
  return nodes_[node].end - end(above);
}

bool PrefixTree::attach_snapshot(int32_t id, SlotTicket& ticket, SnapshotKind kind, bool has_log) {
  if (nodes_[id].snapshot != 0 || nodes_[id].is_detached) return false;
  if (free_snapshot_ == 0 && !evict_snapshot(kind)) return false;
  const int32_t index = free_snapshot_;
  Snapshot& added = snapshots_[index];
  free_snapshot_ = added.older;
  added.ticket = std::move(ticket);
  added.node = id;
  added.kind = kind;
  added.has_log = has_log;
  added.last_step = 0;
  order(kind).push(index);
  nodes_[id].snapshot = index;
  ++version_;
  return true;
}

void PrefixTree::make_anchor(int32_t id) {
  const int32_t index = nodes_[id].snapshot;
  order(snapshots_[index].kind).remove(index);
  snapshots_[index].kind = SnapshotKind::kAnchor;
  order(SnapshotKind::kAnchor).push(index);
}

int32_t PrefixTree::read_snapshot(int32_t id, int64_t step) {
  const int32_t index = nodes_[id].snapshot;
  Snapshot& snapshot = snapshots_[index];
  order(snapshot.kind).remove(index);
  order(snapshot.kind).push(index);
  snapshot.last_step = step;
  return snapshot.ticket.slot();
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
  order(snapshot.kind).remove(index);
  snapshot.node = 0;
  snapshot.older = free_snapshot_;
  free_snapshot_ = index;
  ++version_;
}

}  // namespace headway
