// The invariants of cached prefixes, by name as in integrity.cpp:
//
//   I4  each node that can be found is found under its parent and tokens, and no two share a block; a node's parent is
//       there as long as the node is
//   I5  a snapshot belongs to one node and one slot; a sequence starts at a snapshot, or at the end of its KV where the
//       model keeps no state
//   I6  what a row has left in the tree was computed by retired steps, and is what its request's tokens say; no step in
//       flight writes to a block of the tree
#include <algorithm>

#include "core/error.h"
#include "core/prefix_cache.h"

namespace headway {

void PrefixTree::check_integrity() const {
  std::vector<int32_t> num_children(nodes_.size() + roots_.size(), 0);
  std::vector<uint8_t> has_owner(has_blocks_ ? max_nodes() + 1 : 0, 0);
  int32_t num_live = 0;
  int32_t num_listed = 0;
  for (int32_t id = 1; id <= max_nodes(); ++id) {
    if (nodes_[id].num_tokens == 0) continue;
    ++num_live;
    num_listed += !nodes_[id].is_detached;
    check_node(id, num_children);
    if (nodes_[id].block == kDummyBlock) continue;
    require_integrity(has_owner[nodes_[id].block]++ == 0, "I4: two nodes own one block");
  }
  require_integrity(num_live == num_nodes_, "I4: nodes are miscounted");
  require_integrity(num_listed == map_.num_entries(), "I4: the map has entries that are no nodes");
  for (int32_t id = 1; id <= max_nodes(); ++id) {
    require_integrity(num_children[id] == nodes_[id].num_children, "I4: a node's children are miscounted");
  }
  for (size_t i = 0; i < roots_.size(); ++i) {
    require_integrity(num_children[nodes_.size() + i] == roots_[i].num_children,
                      "I4: a root's children are miscounted");
  }
  check_order();
  check_snapshots();
}

void PrefixTree::check_node(int32_t id, std::vector<int32_t>& num_children) const {
  const Node& found = nodes_[id];
  const int32_t parent = found.parent;
  ++num_children[parent > 0 ? parent : static_cast<int32_t>(nodes_.size()) - parent - 1];
  require_integrity(parent < 0 || (parent > 0 && nodes_[parent].num_tokens == block_size_),
                    "I4: a node hangs from one that is gone, or is shorter than a block");
  require_integrity(found.end == end(parent) + found.num_tokens, "I4: a node is not where its parent ends");
  require_integrity(found.is_detached != (find_child(key(parent, tokens(id))) == id),
                    "I4: a node is not found as itself");
  require_integrity(parent < 0 || found.num_pins <= nodes_[parent].num_pins, "I4: a node is pinned without its parent");
  if (!has_blocks_ || (has_ghosts_ && found.block == kDummyBlock)) return;
  require_integrity(found.block > kDummyBlock && blocks_.ref_count(found.block) > 0, "I4: a node owns no block");
}

void PrefixTree::check_order() const {
  std::vector<int32_t> place(nodes_.size(), 0);
  int32_t num_linked = 0;
  for (int32_t id = oldest(); id != 0; id = unpinned_.next(id)) {
    require_integrity(nodes_[id].num_tokens > 0 && nodes_[id].num_pins == 0, "I4: a node that is held can be evicted");
    place[id] = ++num_linked;
    require_integrity(num_linked <= num_nodes_, "I4: the order of use goes in circles");
  }
  require_integrity(num_linked == unpinned_.size(), "I4: an unpinned node cannot be evicted");
  for (int32_t id = 1; id <= max_nodes(); ++id) {
    const int32_t parent = nodes_[id].parent;
    if (place[id] == 0 || parent <= 0 || place[parent] == 0) continue;
    require_integrity(place[parent] > place[id], "I4: a parent would be evicted before its child");
  }
}

void PrefixTree::check_snapshots() const {
  int32_t num_owned = 0;
  for (int32_t id = 1; id <= max_nodes(); ++id) {
    const int32_t index = nodes_[id].snapshot;
    if (nodes_[id].num_tokens == 0 || index == 0) continue;
    ++num_owned;
    require_integrity(snapshots_[index].node == id, "I5: two nodes own one snapshot");
    require_integrity(snapshots_[index].ticket.slot() != kDummySlot, "I5: a snapshot holds no slot");
    require_integrity(!nodes_[id].is_detached, "I5: a snapshot that cannot be found is kept");
  }
  int32_t num_linked = 0;
  for (const SnapshotKind kind : {SnapshotKind::kAnchor, SnapshotKind::kWaypoint}) {
    for (int32_t i = order(kind).oldest(); i != 0; i = order(kind).next(i)) {
      require_integrity(snapshots_[i].kind == kind, "I5: a snapshot is kept as what it is not");
      ++num_linked;
    }
  }
  require_integrity(num_owned == num_snapshots() && num_linked == num_owned, "I5: snapshots are miscounted");
}

void PrefixCache::check_integrity() const {
  if (!is_on()) return;
  tree_.check_integrity();
  if (host_) host_->check_integrity();
  check_rows();
  check_pins();
  if (config_.num_blocks > 0) check_writes();
  for (const SnapshotKind kind : {SnapshotKind::kAnchor, SnapshotKind::kWaypoint}) {
    require_integrity(num_held(kind) <= max_held(kind), "I5: snapshots exceed their share");
  }
}

void PrefixCache::check_rows() const {
  for (int32_t row = 1; row <= rows_.num_rows(); ++row) {
    const Request* request = rows_.request(row);
    const RowPrefix& prefix = prefixes_[row];
    if (request == nullptr || prefix.node <= 0) continue;
    require_integrity(tree_.end(prefix.node) <= std::max(prefix.start, committed_len(*request)),
                      "I6: a node is there before its step has retired");
    for (int32_t node = prefix.node; node > 0; node = tree_.node(node).parent) {
      const int32_t begin = tree_.end(node) - tree_.node(node).num_tokens;
      require_integrity(
          std::ranges::equal(tree_.tokens(node),
                             std::span<const int32_t>(request->tokens).subspan(begin, tree_.node(node).num_tokens)),
          "I6: a node holds other tokens than its row's request");
      if (config_.num_blocks == 0 || tree_.end(node) > prefix.start) continue;
      require_integrity(rows_.blocks(row)[begin / config_.block_size] == tree_.node(node).block,
                        "I6: a row shares a block that is not its node's");
    }
  }
}

void PrefixCache::check_writes() const {
  std::vector<uint8_t> is_cached(config_.num_blocks + 1, 0);
  for (int32_t id = 1; id <= tree_.max_nodes(); ++id) is_cached[tree_.node(id).block] |= tree_.node(id).num_tokens > 0;
  for (int32_t row = 1; row <= rows_.num_rows(); ++row) {
    if (rows_.request(row) == nullptr || !rows_.is_decoding(row)) continue;
    const size_t next = rows_.launched_len(row) / config_.block_size;
    require_integrity(next >= rows_.blocks(row).size() || is_cached[rows_.blocks(row)[next]] == 0,
                      "I6: a row decodes into a cached block");
  }
  for (const StepNotes& step_notes : notes_) {
    for (const Chunk& chunk : step_notes.chunks) {
      if (chunk.request->row != chunk.row) continue;
      for (int32_t i = chunk.start / config_.block_size; i * config_.block_size < chunk.end; ++i) {
        require_integrity(is_cached[rows_.blocks(chunk.row)[i]] == 0, "I6: a step writes to a cached block");
      }
    }
  }
}

void PrefixCache::check_pins() const {
  std::vector<int32_t> num_pins(tree_.max_nodes() + 1, 0);
  const auto count = [&](int32_t node) {
    for (; node > 0; node = tree_.node(node).parent) ++num_pins[node];
  };
  for (const RowPrefix& prefix : prefixes_) count(prefix.node);
  for (const Released& released : released_) count(released.node);
  if (host_) host_->count_pins(num_pins);
  for (int32_t id = 1; id <= tree_.max_nodes(); ++id) {
    require_integrity(tree_.node(id).num_pins == num_pins[id], "I4: a node's pins are not those of the rows on it");
  }
}

}  // namespace headway
