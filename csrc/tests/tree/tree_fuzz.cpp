#include "tests/tree/tree_fuzz.h"

#include <cstdio>

#include "tests/check.h"

namespace headway::sim {
namespace {

constexpr int32_t kNumTokens = 3;
constexpr int32_t kMaxLen = 24;

LedgerConfig tree_config(Rng& rng) {
  const int32_t kind = rng.draw(0, 3);
  LedgerConfig config{.max_rows = 4,
                      .num_blocks = kind == 1 ? 0 : rng.draw(1, 24),
                      .block_size = rng.draw(1, 4),
                      .num_slots = kind == 0 ? 0 : rng.draw(1, 6),
                      .max_model_len = kMaxLen,
                      .max_step_tokens = kMaxLen,
                      .vocab_size = kNumTokens};
  config.use_prefix_cache = true;
  config.max_snapshots = config.num_slots;
  config.weighs_snapshot_cost = rng.one_in(2);
  if (rng.one_in(2)) return config;
  config.num_host_blocks = config.num_blocks > 0 ? rng.draw(1, 24) : 0;
  config.num_host_slots = config.num_slots > 0 ? rng.draw(1, 6) : 0;
  return config;
}

}  // namespace

TreeFuzz::TreeFuzz(Rng& rng, bool is_quiet)
    : rng_(rng),
      is_quiet_(is_quiet),
      config_(tree_config(rng)),
      blocks_(config_, clock_),
      slots_(config_, clock_),
      tree_(config_, clock_, blocks_, rng.one_in(2) ? ~0u : (1u << rng.draw(0, 8)) - 1) {
  if (config_.has_host_tier()) tier_ = std::make_unique<HostTier>(config_, clock_, tree_, blocks_);
  for (int32_t salt = 0; salt < kNumSalts; ++salt) roots_.push_back(tree_.open_root(std::to_string(salt)));
  if (is_quiet_) return;
  std::printf("new %d %d %d", config_.block_size, config_.num_blocks > 0, config_.num_slots > 0);
  std::printf(" %d %d %d\n", config_.num_host_blocks, config_.num_host_slots, tier_ ? tier_->tree().max_nodes() : 0);
}

void TreeFuzz::run_one() {
  if (tier_ && rng_.one_in(4)) return run_tier();
  switch (rng_.draw(0, 19)) {
    case 0:
    case 1:
    case 2:
    case 3:
      return walk();
    case 4:
    case 5:
    case 6:
      return drop();
    case 7:
    case 8:
    case 9:
    case 10:
      return match();
    case 11:
    case 12:
      return snap();
    case 13:
      return leave();
    case 14:
      return take();
    case 15:
    case 16:
      evict();
      return;
    case 17:
      return thin();
    case 18:
      return rng_.one_in(20) ? hide() : match();
    default:
      if (rng_.one_in(60)) reset();
  }
}

// All that is held is let go; then the tree can spare everything.
void TreeFuzz::drain() {
  while (!rows_.empty()) drop();
  while (tier_ && tier_->is_moving()) finish();
  while (tree_.evict_leaf()) {
  }
  EXPECT_EQ(tree_.num_nodes(), 0);
  EXPECT_EQ(blocks_.num_free(), config_.num_blocks);
  EXPECT_EQ(slots_.num_free(), config_.num_slots);
}

void TreeFuzz::check() const {
  tree_.check_integrity();
}

void TreeFuzz::say(const char* what, int32_t salt, const std::string& tokens, const std::string& more) const {
  if (!is_quiet_) std::printf("%s %d %s%s\n", what, salt, tokens.empty() ? "." : tokens.c_str(), more.c_str());
}

std::string TreeFuzz::text(std::span<const int32_t> tokens) {
  std::string digits;
  for (const int32_t token : tokens) digits += static_cast<char>('0' + token);
  return digits;
}

std::string TreeFuzz::path(const PrefixTree& tree, int32_t node) {
  std::string digits;
  for (; node > 0; node = tree.node(node).parent) digits = text(tree.tokens(node)) + digits;
  return digits;
}

int32_t TreeFuzz::salt_of(const PrefixTree& tree, int32_t node) {
  while (node > 0) node = tree.node(node).parent;
  return tree.salt(node)[0] - '0';
}

std::vector<int32_t> TreeFuzz::random_tokens() {
  std::vector<int32_t> tokens(rng_.draw(0, kMaxLen));
  // Mostly the same token, so that prefixes are long.
  for (int32_t& token : tokens) token = rng_.one_in(6) ? rng_.draw(0, kNumTokens - 1) : 0;
  return tokens;
}

void TreeFuzz::walk() {
  if (rows_.size() == 6) return drop();
  const std::vector<int32_t> tokens = random_tokens();
  const int32_t salt = rng_.draw(0, kNumSalts - 1);
  int32_t node = roots_[salt];
  for (size_t begin = 0; begin + config_.block_size <= tokens.size(); begin += config_.block_size) {
    const auto key = tree_.key(node, std::span<const int32_t>(tokens).subspan(begin, config_.block_size));
    int32_t child = tree_.find_child(key);
    const bool is_there = child != 0;
    if (is_there) tree_.pin_one(child);
    if (!is_there) child = add(key);
    if (child == 0) break;
    node = child;
    say(is_there ? "hold" : "add", salt, path(node), is_there ? "" : " " + std::to_string(tree_.node(node).block));
  }
  if (node > 0) rows_.push_back({salt, node});
}

// Evicts what it must, and says so before.
int32_t TreeFuzz::add(const PrefixTree::Key& key) {
  if (config_.num_blocks == 0) {
    if (tree_.num_nodes() == tree_.max_nodes() && !evict()) return 0;
    return tree_.add_child(key, kDummyBlock, 1);
  }
  if (blocks_.num_free() == 0 && !evict()) return 0;
  const int32_t block = blocks_.acquire();
  const int32_t child = tree_.add_child(key, block, 1);
  blocks_.release(block, 0);
  return child;
}

void TreeFuzz::drop() {
  if (rows_.empty()) return;
  const size_t i = rng_.draw(0, static_cast<int32_t>(rows_.size()) - 1);
  say("drop", rows_[i].salt, path(rows_[i].node));
  tree_.unpin_path(rows_[i].node);
  rows_.erase(rows_.begin() + static_cast<std::ptrdiff_t>(i));
}

void TreeFuzz::match() {
  const std::vector<int32_t> tokens = random_tokens();
  const int32_t salt = rng_.draw(0, kNumSalts - 1);
  const PrefixMatch found = tree_.match(roots_[salt], tokens);
  say("match", salt, text(tokens), " " + std::to_string(found.num_tokens) + " " + std::to_string(found.start));
  if (rng_.one_in(2) && tree_.has_snapshot(found.start_node)) read(salt, found.start_node);
}

void TreeFuzz::read(int32_t salt, int32_t node) {
  tree_.read_snapshot(node, clock_.retired);
  if (rng_.one_in(2)) tree_.make_anchor(node);
  say("read", salt, path(node));
}

void TreeFuzz::snap() {
  if (rows_.empty() || config_.num_slots == 0) return;
  const Row row = rows_[rng_.draw(0, static_cast<int32_t>(rows_.size()) - 1)];
  if (!slots_.has_room()) thin();
  if (!slots_.has_room()) return;
  SlotTicket ticket = slots_.acquire();
  const auto kind = rng_.one_in(2) ? SnapshotKind::kAnchor : SnapshotKind::kWaypoint;
  const bool is_done = tree_.attach_snapshot(row.node, ticket, kind, false);
  say("snap", row.salt, path(row.node), " " + std::to_string(is_done ? tree_.snapshot(row.node).ticket.slot() : 0));
}

void TreeFuzz::leave() {
  if (rows_.empty() || config_.num_slots == 0 || config_.block_size == 1) return;
  Row& row = rows_[rng_.draw(0, static_cast<int32_t>(rows_.size()) - 1)];
  if (tree_.node(row.node).num_tokens < config_.block_size || tree_.node(row.node).is_detached) return;
  if (!slots_.has_room()) thin();
  if (!slots_.has_room()) return;
  std::vector<int32_t> tokens = random_tokens();
  tokens.resize(rng_.draw(1, config_.block_size - 1), 0);
  const auto key = tree_.key(row.node, tokens);
  if (tree_.find_child(key) != 0) return;
  const int32_t node = add(key);
  if (node == 0) return;
  SlotTicket ticket = slots_.acquire();
  tree_.attach_snapshot(node, ticket, SnapshotKind::kAnchor, true);
  row.node = node;
  last_leaf_ = row;
  last_leaf_tokens_.clear();
  for (const char digit : path(node)) last_leaf_tokens_.push_back(digit - '0');
  say("leaf", row.salt, path(node),
      " " + std::to_string(tree_.node(node).block) + " " + std::to_string(tree_.snapshot(node).ticket.slot()));
}

void TreeFuzz::take() {
  const int32_t salt = last_leaf_.salt;
  const std::vector<int32_t>& tokens = last_leaf_tokens_;
  const PrefixMatch found = tree_.match(roots_[salt], tokens);
  if (config_.num_blocks == 0 || found.start % config_.block_size == 0) return;
  say("take", salt, path(found.start_node));
  SlotTicket ticket = tree_.take_snapshot(found.start_node);
  blocks_.release(tree_.take_leaf(found.start_node), 0);
  ticket.release(0);
}

bool TreeFuzz::evict() {
  const int32_t oldest = tree_.oldest();
  if (oldest != 0) say("evict", salt_of(oldest), path(oldest));
  if (oldest == 0 && !is_quiet_) std::printf("evict -\n");
  EXPECT_EQ(tree_.evict_leaf(), oldest != 0);
  return oldest != 0;
}

void TreeFuzz::thin() {
  const int32_t node = tree_.next_snapshot_node();
  if (node != 0) say("thin", salt_of(node), path(node));
  if (node == 0 && !is_quiet_) std::printf("thin -\n");
  EXPECT_EQ(tree_.evict_snapshot(), node != 0);
}

void TreeFuzz::hide() {
  if (rows_.empty()) return;
  const Row row = rows_[rng_.draw(0, static_cast<int32_t>(rows_.size()) - 1)];
  if (tree_.node(row.node).is_detached) return;
  say("hide", row.salt, path(row.node));
  tree_.detach(row.node);
}

void TreeFuzz::reset() {
  if (!is_quiet_) std::printf("reset\n");
  tree_.reset();
  if (tier_) tier_->reset();
}

}  // namespace headway::sim
