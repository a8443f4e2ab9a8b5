#include "core/host_tier.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace headway {
namespace {

constexpr int32_t kPartsKeptFree = 4;  // at most one part in so many of the blocks is moved out ahead
constexpr int32_t kStepsKeptFree = 2;  // or what so many of the largest steps take
constexpr int32_t kPartsKeptSpare = 8;  // of the anchors; but what one request leaves at least
constexpr int32_t kAnchorsPerRequest = 2;
constexpr int32_t kMaxBlocksPerSave = 128;
constexpr size_t kMaxSaves = 4;  // on their way at once

LedgerConfig host_config(const LedgerConfig& config) {
  LedgerConfig host = config;
  host.num_blocks = config.num_host_blocks;
  host.num_slots = host.max_snapshots = config.num_host_slots;
  host.max_waypoints = 0;
  return host;
}

// Each block of the device may be above something in host memory.
int32_t num_ghosts(const LedgerConfig& config) {
  return config.num_blocks > 0 ? config.num_blocks : 0;
}

}  // namespace

HostTier::HostTier(const LedgerConfig& config, const StepClock& clock, PrefixTree& tree, BlockPool& blocks)
    : block_size_(config.block_size),
      has_blocks_(config.num_blocks > 0),
      has_states_(config.num_slots > 0),
      num_kept_free_(std::clamp(kStepsKeptFree * config.blocks_for(config.max_step_tokens), 1,
                                std::max(1, config.num_blocks / kPartsKeptFree))),
      num_kept_spare_(std::max(std::min(kAnchorsPerRequest, config.max_snapshots - config.max_waypoints),
                               (config.max_snapshots - config.max_waypoints) / kPartsKeptSpare)),
      clock_(clock),
      tree_(tree),
      blocks_(blocks),
      host_config_(host_config(config)),
      host_blocks_(host_config_, host_clock_),
      host_slots_(host_config_, host_clock_),
      host_(host_config_, host_clock_, host_blocks_, ~0u, num_ghosts(config)),
      block_saves_(config.num_host_blocks + 1),
      slot_saves_(config.num_host_slots + 1) {}

void HostTier::save(int32_t num_spare_anchors) {
  const auto may_save = [&] { return saves_.moves.size() < kMaxSaves; };
  while (may_save() && has_states_ && num_spare_anchors < num_kept_spare_ && save_snapshot()) {
    ++num_spare_anchors;
  }
  while (may_save() && has_blocks_ && blocks_.num_free() + num_leaving_blocks_ < num_kept_free_ && save_leaves()) {
  }
}

// The oldest leaf, and those above it that are then the oldest. False: nothing can go now.
bool HostTier::save_leaves() {
  const int32_t leaf = tree_.oldest();
  if (leaf == 0 || (tree_.has_snapshot(leaf) && !clock_.has_retired(tree_.snapshot(leaf).last_step))) return false;
  Move move{.transfer = {.is_out = true}};
  if (open_path(leaf)) {
    const int32_t num_wanted = std::min(kMaxBlocksPerSave, num_kept_free_ - blocks_.num_free() - num_leaving_blocks_);
    for (int32_t i = 0; i < num_wanted && !path_.empty() && tree_.oldest() == path_.back(); ++i) {
      const int32_t node = path_.back();
      if (tree_.has_snapshot(node) && !clock_.has_retired(tree_.snapshot(node).last_step)) break;
      move_leaf(node, host_path_[path_.size() - 1], move);
      path_.pop_back();
    }
    close_path();
  } else {
    tree_.evict_leaf();
  }
  push_save(std::move(move));
  return true;
}

// The anchor that would be evicted first; of a leaf within a block all that it is.
bool HostTier::save_snapshot() {
  const int32_t node = tree_.next_snapshot_node(SnapshotKind::kAnchor);
  if (node == 0 || tree_.node(node).num_pins > 0 || !open_path(node)) return false;
  Move move{.transfer = {.is_out = true}};
  const int32_t host_node = host_path_.back();
  if (tree_.node(node).num_tokens < block_size_) {
    move_leaf(node, host_node, move);
  } else {
    move_snapshot(node, host_node, move);
  }
  close_path();
  push_save(std::move(move));
  return true;
}

// Finds or makes the twins of the node and of all above it. False where the node is worth nothing in host memory.
bool HostTier::open_path(int32_t node) {
  path_.clear();
  host_path_.clear();
  int32_t root = node;
  for (; root > 0; root = tree_.node(root).parent) path_.push_back(root);
  std::ranges::reverse(path_);
  host_root_ = host_.open_root(tree_.salt(root));
  int32_t parent = host_root_;
  for (const int32_t each : path_) {
    const PrefixTree::Key key = host_.key(parent, tree_.tokens(each));
    int32_t twin = host_.find_child(key);
    if (twin != 0) host_.pin_one(twin);
    if (twin == 0) twin = host_.add_child(key, kDummyBlock, 0);
    if (twin == 0) break;
    host_path_.push_back(twin);
    parent = twin;
  }
  if (host_path_.size() == path_.size() && is_worth_saving(node)) return true;
  close_path();
  return false;
}

// What is not kept for its own sake or for those below it would lie there as a ghost.
void HostTier::close_path() {
  if (!host_path_.empty()) host_.unpin_path(host_path_.back());
  host_.close_root(host_root_);
}

// Keys and values alone serve nobody where the model keeps states, unless host memory has a state below them.
bool HostTier::is_worth_saving(int32_t node) const {
  const int32_t twin = host_path_.back();
  if (!has_states_ || host_.node(twin).num_children > 0 || host_.has_snapshot(twin)) return true;
  return tree_.has_snapshot(node) && tree_.snapshot(node).kind == SnapshotKind::kAnchor;
}

void HostTier::move_snapshot(int32_t node, int32_t host_node, Move& move) {
  const bool is_wanted = tree_.snapshot(node).kind == SnapshotKind::kAnchor && !host_.has_snapshot(host_node);
  const bool has_log = tree_.snapshot(node).has_log;
  SlotTicket ticket = tree_.take_snapshot(node);
  if (!is_wanted || !make_host_slot()) return ticket.release(clock_.retired);
  SlotTicket host_ticket = host_slots_.acquire();
  const RecordMove moved{ticket.slot(), host_ticket.slot()};
  if (!host_.attach_snapshot(host_node, host_ticket, SnapshotKind::kAnchor, has_log)) {
    host_ticket.release(0);
    return ticket.release(clock_.retired);
  }
  move.transfer.slots.push_back(moved);
  move.tickets.push_back(std::move(ticket));
}

void HostTier::move_leaf(int32_t node, int32_t host_node, Move& move) {
  if (tree_.has_snapshot(node)) move_snapshot(node, host_node, move);
  const int32_t block = tree_.take_leaf(node);
  if (!has_blocks_) return;
  if (host_.node(host_node).block != kDummyBlock || !make_host_block()) return blocks_.release(block, clock_.retired);
  const int32_t host_block = host_blocks_.acquire();
  host_.replace_block(host_node, host_block);
  host_blocks_.release(host_block, 0);
  move.transfer.blocks.push_back({block, host_block});
}

// Leaves may be ghosts, which free nothing.
bool HostTier::make_host_block() {
  while (host_blocks_.num_free() == 0) {
    if (!host_.evict_leaf()) return false;
  }
  return true;
}

bool HostTier::make_host_slot() {
  if (host_slots_.has_room()) return true;
  const int32_t oldest = host_.next_snapshot_node(SnapshotKind::kAnchor);
  return oldest != 0 && !is_read(oldest) && host_.evict_snapshot();
}

bool HostTier::is_read(int32_t host_node) const {
  return std::ranges::any_of(loads_.moves, [&](const Move& move) { return move.host_node == host_node; });
}

void HostTier::push_save(Move&& move) {
  if (move.transfer.blocks.empty() && move.transfer.slots.empty()) return;
  ++saves_.num_pushed;
  for (const RecordMove& block : move.transfer.blocks) block_saves_[block.target] = saves_.num_pushed;
  for (const RecordMove& slot : move.transfer.slots) slot_saves_[slot.target] = saves_.num_pushed;
  const auto num_blocks = static_cast<int32_t>(move.transfer.blocks.size());
  const auto num_slots = static_cast<int32_t>(move.transfer.slots.size());
  num_leaving_blocks_ += num_blocks;
  counts_.num_saved_blocks += num_blocks;
  counts_.num_saved_snapshots += num_slots;
  num_moving_slots_ += num_slots;
  saves_.moves.push_back(std::move(move));
}

// The deepest state behind keys and values that are on the device up to match.num_tokens, and in host memory from there
// on.
int32_t HostTier::find(Request& request, std::span<const int32_t> tokens, const PrefixMatch& match) const {
  const int64_t version = tree_.version() + host_.version();
  if (request.host_version == version) return request.host_node;
  request.host_version = version;
  request.host_node = 0;
  int32_t node = host_.find_root(tree_.salt(request.root));
  if (node == 0) return 0;
  TagsAhead tags = host_.tags_below(node, tokens);
  while (true) {
    const auto left = tokens.subspan(host_.end(node));
    if (const int32_t found = find_short(node, left, match.start); found != 0) request.host_node = found;
    if (!tags.has_next()) return request.host_node;
    node = host_.find_child({node, tags.next(), left.first(block_size_)});
    if (node == 0) return request.host_node;
    const int32_t end = host_.end(node);
    if (has_blocks_ && end > match.num_tokens && host_.node(node).block == kDummyBlock) return request.host_node;
    if (end > match.start && (!has_states_ || host_.has_snapshot(node))) request.host_node = node;
  }
}

// Its block must be here: on the device it would be in the leaf that has left.
int32_t HostTier::find_short(int32_t host_node, std::span<const int32_t> tokens, int32_t after) const {
  const int32_t end = host_.end(host_node);
  for (auto length = std::min<int32_t>(static_cast<int32_t>(tokens.size()), block_size_ - 1);
       has_states_ && host_.has_short_children(host_node) && length > 0 && end + length > after; --length) {
    const int32_t child = host_.find_child(host_.key(host_node, tokens.first(length)));
    if (host_.has_snapshot(child) && (!has_blocks_ || host_.node(child).block != kDummyBlock)) return child;
  }
  return 0;
}

bool HostTier::has_arrived(int32_t host_node, int32_t start) const {
  if (has_states_ && slot_saves_[host_.snapshot(host_node).ticket.slot()] > saves_.num_finished) return false;
  for (int32_t node = host_node; has_blocks_ && host_.end(node) > start; node = host_.node(node).parent) {
    if (block_saves_[host_.node(node).block] > saves_.num_finished) return false;
  }
  return true;
}

void HostTier::load(Request& request, const PrefixMatch& match, int32_t host_node, SlotTicket slot) {
  const std::string_view salt = tree_.salt(request.root);
  const bool is_short = host_.node(host_node).num_tokens < block_size_;
  const int32_t last_full = host_.end(is_short ? host_.node(host_node).parent : host_node);
  Move move{.node = std::max(match.node, 0), .host_node = host_node};
  while (tree_.end(move.node) > last_full) move.node = std::max(tree_.node(move.node).parent, 0);
  move.root = tree_.open_root(salt);
  move.host_root = host_.open_root(salt);
  tree_.pin_path(move.node);
  host_.pin_path(host_node);
  for (int32_t node = host_node; has_blocks_ && host_.end(node) > tree_.end(move.node);
       node = host_.node(node).parent) {
    if (blocks_.num_free() == 0) tree_.evict_leaf();
    move.transfer.blocks.push_back({host_.node(node).block, blocks_.acquire()});
  }
  std::ranges::reverse(move.transfer.blocks);
  if (has_states_) {
    move.has_log = host_.snapshot(host_node).has_log;
    move.transfer.slots.push_back({host_.read_snapshot(host_node, 0), slot.slot()});
    move.tickets.push_back(std::move(slot));
  }
  request.loaded_start = host_.end(host_node);
  num_moving_slots_ += static_cast<int32_t>(move.transfer.slots.size());
  loads_.moves.push_back(std::move(move));
  request.load_number = ++loads_.num_pushed;
}

const Transfer* HostTier::next() {
  for (Lane* lane : {&loads_, &saves_}) {
    if (lane->num_given < lane->num_pushed) return &lane->moves[lane->num_given++ - lane->num_finished].transfer;
  }
  return nullptr;
}

void HostTier::finish(bool is_out) {
  Lane& lane = is_out ? saves_ : loads_;
  require_integrity(lane.num_finished < lane.num_given, "a transfer is finished that nobody was given");
  Move move = std::move(lane.moves.front());
  lane.moves.pop_front();
  ++lane.num_finished;
  num_moving_slots_ -= static_cast<int32_t>(move.transfer.slots.size());
  if (is_out) {
    num_leaving_blocks_ -= static_cast<int32_t>(move.transfer.blocks.size());
    for (const RecordMove& block : move.transfer.blocks) blocks_.release(block.source, clock_.retired);
  } else {
    enter(move);
    for (const RecordMove& block : move.transfer.blocks) blocks_.release(block.target, clock_.retired);
    host_.unpin_path(move.host_node);
    tree_.close_root(move.root);
    host_.close_root(move.host_root);
  }
  for (SlotTicket& ticket : move.tickets) ticket.release(clock_.retired);
}

// What came back enters the tree, where nobody has computed the same meanwhile.
void HostTier::enter(Move& move) {
  int32_t deepest = move.node;
  if (!move.is_void && (deepest == 0 || !tree_.node(deepest).is_detached)) {
    path_.clear();
    for (int32_t node = move.host_node; host_.end(node) > tree_.end(move.node); node = host_.node(node).parent) {
      path_.push_back(node);
    }
    size_t num_entered = 0;
    for (; !path_.empty(); path_.pop_back(), ++num_entered) {
      const PrefixTree::Key key = tree_.key(deepest != 0 ? deepest : move.root, host_.tokens(path_.back()));
      const int32_t known = tree_.find_child(key);
      if (known != 0) tree_.pin_one(known);
      const int32_t block = has_blocks_ ? move.transfer.blocks[num_entered].target : kDummyBlock;
      const int32_t child = known != 0 ? known : tree_.add_child(key, block, 0);
      if (child == 0) break;
      deepest = child;
    }
    counts_.num_loaded_blocks += has_blocks_ ? static_cast<int64_t>(num_entered) : 0;
    if (path_.empty() && has_states_) {
      const bool has_log = move.has_log;
      counts_.num_loaded_snapshots +=
          tree_.attach_snapshot(deepest, move.tickets.front(), SnapshotKind::kAnchor, has_log);
    }
  }
  tree_.unpin_path(deepest);
}

void HostTier::reset() {
  for (Move& move : loads_.moves) move.is_void = true;
  host_.reset();
}

void HostTier::count_held(std::vector<int32_t>& num_holders) const {
  for (const Move& move : saves_.moves) {
    for (const RecordMove& block : move.transfer.blocks) ++num_holders[block.source];
  }
  for (const Move& move : loads_.moves) {
    for (const RecordMove& block : move.transfer.blocks) ++num_holders[block.target];
  }
}

void HostTier::count_pins(std::vector<int32_t>& num_pins) const {
  for (const Move& move : loads_.moves) {
    for (int32_t node = move.node; node > 0; node = tree_.node(node).parent) ++num_pins[node];
  }
}

void HostTier::add_to(PrefixStats& stats) const {
  stats.num_host_blocks = host_config_.num_blocks - host_blocks_.num_free();
  stats.num_host_snapshots = host_.num_snapshots();
  stats.num_saved_blocks = counts_.num_saved_blocks;
  stats.num_saved_snapshots = counts_.num_saved_snapshots;
  stats.num_loaded_blocks = counts_.num_loaded_blocks;
  stats.num_loaded_snapshots = counts_.num_loaded_snapshots;
}

void HostTier::check_integrity() const {
  host_.check_integrity();
  host_blocks_.ids().check_integrity("host blocks");
  host_slots_.ids().check_integrity("host slots");
  std::vector<int32_t> num_pins(host_.max_nodes() + 1, 0);
  for (const Move& move : loads_.moves) {
    for (int32_t node = move.host_node; node > 0; node = host_.node(node).parent) ++num_pins[node];
  }
  int32_t num_blocks = 0;
  for (int32_t id = 1; id <= host_.max_nodes(); ++id) {
    require_integrity(host_.node(id).num_pins == num_pins[id], "I4: a host node's pins are not those of the loads");
    num_blocks += host_.node(id).num_tokens > 0 && host_.node(id).block != kDummyBlock;
  }
  require_integrity(num_blocks == host_blocks_.ids().num_live(), "I4: a host block is held by nobody");
  require_integrity(host_.num_snapshots() == host_slots_.ids().num_live(), "I5: a host slot is held by nobody");
}

}  // namespace headway
