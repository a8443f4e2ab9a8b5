// What requests leave behind for those that begin alike: a tree of token runs. A node is one KV block's worth of tokens
// and owns that block; at its end it may own a state snapshot. Only full nodes have children. A shorter node is a leaf
// where a sequence ended; it is there for its snapshot alone.
//
// Children are found through one hash map keyed by (parent, tokens) through a hash of all tokens from the root on, and
// a hit compares the tokens themselves. Each salt has a root of its own. A node is pinned with all its ancestors while
// a row uses it; unpinned nodes are kept in the order of their last use, a parent always later than its children, so
// the first in order is a leaf.
//
// Snapshots come in two kinds, each in an order of its own: anchors, where a sequence ended or parted from another, and
// waypoints, kept on a prompt's way for those that will part from it. Neither pushes out the other; who needs a slot
// rather than a snapshot takes a waypoint's first.
//
// Every node holds what a retired step has written: who adds nodes sees to that. Knows nothing of requests and rows.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/block_pool.h"
#include "core/node_map.h"
#include "core/slot_pool.h"
#include "core/token_tags.h"
#include "core/types.h"
#include "core/use_order.h"

namespace headway {

enum class SnapshotKind : int32_t { kAnchor = 0, kWaypoint = 1 };
inline constexpr int32_t kNumSnapshotKinds = 2;

class PrefixTree {
 public:
  // A line of cache each.
  struct alignas(64) Node {
    int32_t parent = 0;
    int32_t end = 0;  // tokens from the beginning of the sequence to the node's end
    int32_t num_tokens = 0;  // its own: block_size, or fewer in a leaf
    int32_t num_children = 0;
    int32_t num_short_children = 0;  // of those, shorter than a block
    int32_t num_pins = 0;
    int32_t block = kDummyBlock;
    int32_t snapshot = 0;
    int32_t older = 0;  // links of the order of use while unpinned; of the free list
    int32_t newer = 0;
    uint32_t tag = 0;
    bool is_detached = false;  // cannot be found any more; goes when nothing holds it
    int64_t writer = 0;  // request id
  };
  struct Snapshot {
    SlotTicket ticket;
    int32_t node = 0;
    int32_t older = 0;
    int32_t newer = 0;
    SnapshotKind kind = SnapshotKind::kAnchor;
    bool has_log = false;  // the slot holds an older state and the inputs since: fold them before it is read
    int64_t last_step = 0;  // the last step that reads or writes it
  };

  // tag_mask: fewer bits make hash values collide, which must not matter. num_ghosts: nodes beyond the blocks, of which
  // some then own none.
  PrefixTree(const LedgerConfig& config, const StepClock& clock, BlockPool& blocks, uint32_t tag_mask = ~0u,
             int32_t num_ghosts = 0);

  // A root lives while somebody has it open or it has children. May allocate.
  int32_t open_root(std::string_view salt);
  void close_root(int32_t root);
  int32_t find_root(std::string_view salt) const;  // 0: there is none
  std::string_view salt(int32_t root_id) const { return root(root_id).salt; }

  // tokens: those that may be reused, so never a whole prompt. Changes nothing.
  PrefixMatch match(int32_t root, std::span<const int32_t> tokens) const;
  // Whether another root begins with these tokens: would it be a hit if the salt were another?
  bool is_known_elsewhere(int32_t root, std::span<const int32_t> tokens) const;
  // What a node is found by.
  struct Key {
    int32_t parent;
    uint32_t tag;
    std::span<const int32_t> tokens;
  };
  Key key(int32_t parent, std::span<const int32_t> tokens) const {
    return {parent, tags_.after(tag(parent), tokens), tokens};
  }
  // The tags of the full blocks that follow a node: for keys of one below the other.
  TagsAhead tags_below(int32_t parent, std::span<const int32_t> tokens) const {
    return {tags_, map_, tag(parent), tokens, block_size_};
  }
  int32_t find_child(const Key& key) const;

  // A new node, pinned once; its ancestors must be pinned. Shares the block. 0: no room, and nothing pinned can go.
  int32_t add_child(const Key& key, int32_t block, int64_t writer);
  void pin_path(int32_t node);  // with all its ancestors
  void unpin_path(int32_t node);
  void pin_one(int32_t node);  // by who has pinned its parent

  // The node owns another block of the same content instead of one that nobody reads, or of none.
  void replace_block(int32_t node, int32_t block);

  // Each makes one thing free at once, or returns false.
  bool evict_leaf();
  bool evict_snapshot(int32_t spared_node = 0);  // for its slot: of either kind
  bool evict_snapshot(SnapshotKind kind);

  // Takes the ticket's slot; false (the ticket is untouched) when the node has one already or no room can be made.
  bool attach_snapshot(int32_t node, SlotTicket& ticket, SnapshotKind kind, bool has_log);
  void make_anchor(int32_t node);  // of its waypoint
  // The slot to read in `step`; counts as a use.
  int32_t read_snapshot(int32_t node, int64_t step);
  // Until `step` has retired, the slot goes to nobody who has not read it.
  void hold_snapshot(int32_t node, int64_t step) { snapshots_[nodes_[node].snapshot].last_step = step; }
  void clear_log(int32_t node) { snapshots_[nodes_[node].snapshot].has_log = false; }
  SlotTicket take_snapshot(int32_t node);
  // Removes an unpinned leaf and hands out its block, which the tree then no longer holds. Take its snapshot first.
  int32_t take_leaf(int32_t node);

  void detach(int32_t node);  // no match goes through it any more
  void reset();  // no match finds anything that is here now

  const Node& node(int32_t id) const { return nodes_[id]; }
  const Snapshot& snapshot(int32_t id) const { return snapshots_[nodes_[id].snapshot]; }
  bool has_snapshot(int32_t id) const { return id > 0 && nodes_[id].snapshot != 0; }
  int32_t end(int32_t id) const { return id > 0 ? nodes_[id].end : 0; }
  std::span<const int32_t> tokens(int32_t id) const;
  bool has_short_children(int32_t id) const { return num_short_children(id) > 0; }
  bool can_evict_snapshot(int32_t spared_node) const { return pick_slot(spared_node) != 0; }
  int32_t oldest() const { return unpinned_.oldest(); }  // what evict_leaf() removes; 0: nothing
  int32_t next_snapshot_node() const { return snapshots_[pick_slot(0)].node; }  // and evict_snapshot()
  int32_t next_snapshot_node(SnapshotKind kind) const { return snapshots_[pick_snapshot(kind, 0)].node; }
  int32_t num_unpinned_to(int32_t node) const;  // on the path from the root
  int64_t num_root_users() const;
  int32_t num_nodes() const { return num_nodes_; }
  int32_t num_unpinned() const { return unpinned_.size(); }
  int32_t num_snapshots(SnapshotKind kind) const { return order(kind).size(); }
  int32_t num_snapshots() const {
    return num_snapshots(SnapshotKind::kAnchor) + num_snapshots(SnapshotKind::kWaypoint);
  }
  int32_t max_nodes() const { return static_cast<int32_t>(nodes_.size()) - 1; }
  int64_t version() const { return version_; }  // moves with everything that a match could see
  int64_t num_evicted_nodes() const { return num_evicted_nodes_; }
  int64_t num_evicted_snapshots() const { return num_evicted_snapshots_; }

  void check_integrity() const;  // I4 and I5 for the tree itself

 private:
  struct Root {
    std::string salt;
    int32_t num_users = 0;
    int32_t num_children = 0;
    int32_t num_short_children = 0;
  };

  Root& root(int32_t id) { return roots_[-id - 1]; }
  const Root& root(int32_t id) const { return roots_[-id - 1]; }
  int32_t num_short_children(int32_t parent) const;
  void count_child(int32_t parent, int32_t num_tokens, int32_t change);
  uint32_t tag(int32_t id) const { return id > 0 ? nodes_[id].tag : static_cast<uint32_t>(id); }
  void match_short_child(std::span<const int32_t> tokens, PrefixMatch& found) const;
  UseOrder<Snapshot>& order(SnapshotKind kind) { return snapshot_orders_[static_cast<size_t>(kind)]; }
  const UseOrder<Snapshot>& order(SnapshotKind kind) const { return snapshot_orders_[static_cast<size_t>(kind)]; }
  int32_t pick_slot(int32_t spared_node) const;
  int32_t pick_snapshot(SnapshotKind kind, int32_t spared_node) const;
  void evict(int32_t snapshot);
  int32_t num_tokens_saved(int32_t snapshot) const;
  void drop_snapshot(int32_t index, int64_t last_step);
  int32_t remove(int32_t node);
  void remove_detached(int32_t node);
  void check_node(int32_t id, std::vector<int32_t>& num_children) const;
  void check_order() const;
  void check_snapshots() const;

  const int32_t block_size_;
  const bool has_blocks_;
  const bool has_ghosts_;
  const bool has_states_;
  const bool weighs_cost_;
  const TokenTags tags_;
  const StepClock& clock_;
  BlockPool& blocks_;
  std::vector<Node> nodes_;  // [max_nodes + 1]; 0 is nobody
  std::vector<int32_t> tokens_;  // [max_nodes + 1, block_size]
  std::vector<Snapshot> snapshots_;  // [max_snapshots + 1]; 0 likewise
  UseOrder<Node> unpinned_{nodes_};
  std::array<UseOrder<Snapshot>, kNumSnapshotKinds> snapshot_orders_{UseOrder(snapshots_), UseOrder(snapshots_)};
  std::vector<Root> roots_;
  NodeMap map_;
  int32_t free_node_ = 0;
  int32_t free_snapshot_ = 0;
  int32_t num_nodes_ = 0;
  int64_t version_ = 0;
  int64_t num_evicted_nodes_ = 0;
  int64_t num_evicted_snapshots_ = 0;
};

}  // namespace headway
