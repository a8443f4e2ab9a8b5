#include "core/prefix_tree.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace headway {
namespace {

// Without attention a node holds tokens only, so their number is free: enough for 64 MiB of tokens at most.
constexpr int64_t kMaxTokensWithoutBlocks = int64_t{1} << 24;
constexpr size_t kNumRootsAsked = 64;      // for the reason of a miss
constexpr int32_t kNumEvictionsAhead = 6;  // at some 50 ns each: two trips to memory

int32_t node_count(const LedgerConfig& config) {
  if (!config.use_prefix_cache) return 0;
  if (config.num_blocks > 0) return config.num_blocks;
  const int64_t nodes_per_row = (int64_t{config.max_model_len} + config.block_size - 1) / config.block_size;
  const int64_t most = std::max(nodes_per_row, kMaxTokensWithoutBlocks / config.block_size);
  return static_cast<int32_t>(std::min(most, 4 * nodes_per_row * std::max(1, config.num_slots)));
}

}  // namespace

PrefixTree::PrefixTree(const LedgerConfig& config, const StepClock& clock, BlockPool& blocks, uint32_t tag_mask,
                       int32_t num_ghosts)
    : block_size_(config.block_size),
      has_blocks_(config.num_blocks > 0),
      has_ghosts_(num_ghosts > 0),
      has_states_(config.num_slots > 0),
      weighs_cost_(config.weighs_snapshot_cost),
      tags_(tag_mask),
      clock_(clock),
      blocks_(blocks),
      nodes_(node_count(config) + num_ghosts + 1),
      tokens_(nodes_.size() * config.block_size),
      snapshots_(config.use_prefix_cache ? config.max_snapshots + 1 : 1),
      map_(max_nodes()) {
  for (int32_t id = max_nodes(); id > 0; --id) {
    nodes_[id].older = free_node_;
    free_node_ = id;
  }
  for (auto i = static_cast<int32_t>(snapshots_.size()) - 1; i > 0; --i) {
    snapshots_[i].older = free_snapshot_;
    free_snapshot_ = i;
  }
}

int32_t PrefixTree::open_root(std::string_view salt) {
  int32_t id = find_root(salt);
  if (id == 0) {
    const auto is_unused = [](const Root& each) { return each.num_users == 0 && each.num_children == 0; };
    const auto unused = std::ranges::find_if(roots_, is_unused);
    id = -static_cast<int32_t>(unused - roots_.begin()) - 1;
    if (unused == roots_.end()) roots_.emplace_back();
    root(id).salt = salt;
  }
  ++root(id).num_users;
  return id;
}

void PrefixTree::close_root(int32_t id) {
  --root(id).num_users;
}

int32_t PrefixTree::find_root(std::string_view salt) const {
  for (size_t i = 0; i < roots_.size(); ++i) {
    const bool is_used = roots_[i].num_users > 0 || roots_[i].num_children > 0;
    if (is_used && roots_[i].salt == salt) return -static_cast<int32_t>(i) - 1;
  }
  return 0;
}

int64_t PrefixTree::num_root_users() const {
  int64_t num_users = 0;
  for (const Root& each : roots_) num_users += each.num_users;
  return num_users;
}

PrefixMatch PrefixTree::match(int32_t root, std::span<const int32_t> tokens) const {
  PrefixMatch found{.node = root};
  TagsAhead tags = tags_below(root, tokens);
  while (true) {
    const auto left = tokens.subspan(found.num_tokens);
    if (has_states_) match_short_child(left, found);
    if (!tags.has_next()) return found;
    const int32_t child = find_child({found.node, tags.next(), left.first(block_size_)});
    if (child == 0) return found;
    found.node = child;
    found.num_tokens += block_size_;
    if (!has_states_ || nodes_[child].snapshot != 0) {
      found.start_node = child;
      found.start = found.num_tokens;
    }
  }
}

bool PrefixTree::is_known_elsewhere(int32_t root, std::span<const int32_t> tokens) const {
  if (tokens.size() < static_cast<size_t>(block_size_)) return false;
  for (size_t i = 0; i < std::min(roots_.size(), kNumRootsAsked); ++i) {
    const int32_t other = -static_cast<int32_t>(i) - 1;
    if (other != root && find_child(key(other, tokens.first(block_size_))) != 0) return true;
  }
  return false;
}

int32_t PrefixTree::find_child(const Key& wanted) const {
  return map_.find(wanted.tag, [&](int32_t id) {
    const Node& found = nodes_[id];
    if (found.parent != wanted.parent || found.num_tokens != std::ssize(wanted.tokens)) return false;
    return std::memcmp(&tokens_[int64_t{id} * block_size_], wanted.tokens.data(), wanted.tokens.size_bytes()) == 0;
  });
}

// The longest that has a snapshot. Its block can be written by one row only, so it must be free to be taken: until the
// last step of the row that has left it has retired, it is not.
void PrefixTree::match_short_child(std::span<const int32_t> tokens, PrefixMatch& found) const {
  if (num_short_children(found.node) == 0) return;
  for (size_t length = std::min<size_t>(tokens.size(), block_size_ - 1); length > 0; --length) {
    const int32_t child = find_child(key(found.node, tokens.first(length)));
    if (child == 0 || nodes_[child].snapshot == 0) continue;
    if (has_blocks_ && nodes_[child].num_pins > 0) {
      found.held_start = std::max(found.held_start, nodes_[child].end);
      continue;
    }
    found.start_node = child;
    found.start = nodes_[child].end;
    return;
  }
}

int32_t PrefixTree::num_short_children(int32_t parent) const {
  return parent < 0 ? root(parent).num_short_children : nodes_[parent].num_short_children;
}

void PrefixTree::count_child(int32_t parent, int32_t num_tokens, int32_t change) {
  const int32_t short_change = num_tokens < block_size_ ? change : 0;
  (parent < 0 ? root(parent).num_children : nodes_[parent].num_children) += change;
  (parent < 0 ? root(parent).num_short_children : nodes_[parent].num_short_children) += short_change;
}

int32_t PrefixTree::add_child(const Key& key, int32_t block, int64_t writer) {
  if (free_node_ == 0 && !evict_leaf()) return 0;
  const int32_t id = free_node_;
  Node& added = nodes_[id];
  free_node_ = added.older;
  const auto num_tokens = static_cast<int32_t>(key.tokens.size());
  added = {.parent = key.parent,
           .end = end(key.parent) + num_tokens,
           .num_tokens = num_tokens,
           .num_pins = 1,
           .block = block,
           .tag = key.tag,
           .writer = writer};
  std::memcpy(&tokens_[int64_t{id} * block_size_], key.tokens.data(), key.tokens.size_bytes());
  if (block != kDummyBlock) blocks_.share(block);
  count_child(key.parent, num_tokens, 1);
  map_.insert(key.tag, id);
  ++num_nodes_;
  ++version_;
  return id;
}

void PrefixTree::pin_path(int32_t id) {
  for (; id > 0; id = nodes_[id].parent) pin_one(id);
}

void PrefixTree::pin_one(int32_t id) {
  if (nodes_[id].num_pins++ == 0) unpinned_.remove(id);
}

// From the leaf to the root, so that a parent is always used later than its children.
void PrefixTree::unpin_path(int32_t id) {
  while (id > 0) {
    Node& node = nodes_[id];
    const int32_t parent = node.parent;
    if (--node.num_pins == 0) unpinned_.push(id);
    version_ += node.num_tokens < block_size_;  // it can be taken now
    if (node.is_detached) remove_detached(id);
    id = parent;
  }
}

void PrefixTree::replace_block(int32_t id, int32_t block) {
  blocks_.share(block);
  if (nodes_[id].block != kDummyBlock) blocks_.release(nodes_[id].block, clock_.retired);
  nodes_[id].block = block;
}

bool PrefixTree::evict_leaf() {
  const int32_t oldest = unpinned_.oldest();
  if (oldest == 0) return false;
  // Evictions come in rows, and each waits for memory: what a later one touches is asked for now.
  int32_t later = oldest;
  for (int32_t i = 0; i < kNumEvictionsAhead; ++i) later = unpinned_.next(later);
  map_.prefetch(nodes_[later].tag);
  __builtin_prefetch(&nodes_[nodes_[later].newer]);
  __builtin_prefetch(&tokens_[int64_t{later} * block_size_], 1);
  ++num_evicted_nodes_;
  num_evicted_snapshots_ += nodes_[oldest].snapshot != 0;
  remove_detached(remove(oldest));
  return true;
}

// The node goes with all it owns; returns its parent.
int32_t PrefixTree::remove(int32_t id) {
  Node& node = nodes_[id];
  require_integrity(node.num_children == 0 && node.num_pins == 0, "I4: a node is removed that others need");
  const int32_t parent = node.parent;
  unpinned_.remove(id);
  if (!node.is_detached) map_.erase(node.tag, id);
  if (node.snapshot != 0) drop_snapshot(node.snapshot, snapshots_[node.snapshot].last_step);
  if (has_blocks_ && node.block != kDummyBlock) blocks_.release(node.block, clock_.retired);
  count_child(parent, node.num_tokens, -1);
  node = {};
  node.older = free_node_;
  free_node_ = id;
  --num_nodes_;
  ++version_;
  return parent;
}

// A detached node is of no use to anybody but those who hold it.
void PrefixTree::remove_detached(int32_t id) {
  while (id > 0 && nodes_[id].is_detached && nodes_[id].num_children == 0 && nodes_[id].num_pins == 0) id = remove(id);
}

int32_t PrefixTree::take_leaf(int32_t id) {
  const int32_t block = nodes_[id].block;
  nodes_[id].block = kDummyBlock;
  remove_detached(remove(id));
  return block;
}

void PrefixTree::detach(int32_t id) {
  Node& node = nodes_[id];
  if (node.is_detached) return;
  map_.erase(node.tag, id);
  node.is_detached = true;
  ++version_;
  if (node.snapshot != 0) drop_snapshot(node.snapshot, snapshots_[node.snapshot].last_step);
  remove_detached(id);
}

void PrefixTree::reset() {
  while (oldest() != 0) remove_detached(remove(oldest()));
  for (int32_t id = 1; id <= max_nodes(); ++id) {
    if (nodes_[id].num_tokens > 0) detach(id);
  }
}

std::span<const int32_t> PrefixTree::tokens(int32_t id) const {
  return {&tokens_[int64_t{id} * block_size_], static_cast<size_t>(nodes_[id].num_tokens)};
}

int32_t PrefixTree::num_unpinned_to(int32_t id) const {
  int32_t count = 0;
  for (; id > 0 && nodes_[id].num_pins == 0; id = nodes_[id].parent) ++count;
  return count;
}

}  // namespace headway
