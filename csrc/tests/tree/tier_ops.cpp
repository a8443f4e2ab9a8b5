// What moves to host memory and back.
#include <algorithm>
#include <cstdio>

#include "tests/check.h"
#include "tests/tree/tree_fuzz.h"

namespace headway::sim {
namespace {

std::string moves(const std::vector<RecordMove>& records) {
  std::string all;
  for (const RecordMove& move : records) {
    all += " " + std::to_string(move.source) + ">" + std::to_string(move.target);
  }
  return all;
}

}  // namespace

void TreeFuzz::run_tier() {
  switch (rng_.draw(0, 2)) {
    case 0:
      return save();
    case 1:
      return load();
    default:
      return finish();
  }
}

void TreeFuzz::save() {
  const std::string before = nodes(tree_);
  tier_->save(rng_.draw(0, 2));
  say_transfers();
  say_all("save", before);
}

// Half of the prompts begin with something that is there.
void TreeFuzz::load() {
  const PrefixTree& host = tier_->tree();
  const int32_t some = rng_.draw(0, host.max_nodes());
  int32_t salt = rng_.draw(0, kNumSalts - 1);
  std::vector<int32_t> tokens = random_tokens();
  if (some > 0 && host.node(some).num_tokens > 0 && !host.node(some).is_detached) {
    const std::string known = path(host, some);
    tokens.resize(rng_.draw(0, 3), 0);
    tokens.insert(tokens.begin(), known.size(), 0);
    std::ranges::transform(known, tokens.begin(), [](char digit) { return digit - '0'; });
    salt = salt_of(host, some);
  }
  const PrefixMatch match = tree_.match(roots_[salt], tokens);
  Request request;
  request.root = roots_[salt];
  const int32_t found = tier_->find(request, tokens, match);
  say("seek", salt, text(tokens), " " + std::to_string(tier_->end(found)));
  if (found == 0 || tier_->is_on_its_way(found) || !tier_->has_arrived(found, match.num_tokens)) return;
  if (!can_load(found, match)) return;
  const std::string before = nodes(tree_);
  tier_->load(request, match, found, config_.num_slots > 0 ? slots_.acquire() : SlotTicket());
  EXPECT_TRUE(tier_->is_loading(request));
  say_transfers();
  say_all("load " + std::to_string(salt) + " " + path(host, found), before);
}

bool TreeFuzz::can_load(int32_t host_node, const PrefixMatch& match) const {
  const int32_t end = tier_->end(host_node);
  const int32_t begin = std::min(match.num_tokens, end / config_.block_size * config_.block_size);
  const int32_t num_spare = blocks_.num_free() + tree_.num_unpinned() - tree_.num_unpinned_to(match.node);
  return slots_.has_room() && config_.blocks_for(end - begin) <= num_spare;
}

void TreeFuzz::finish() {
  if (!tier_->is_moving()) return;
  const bool is_out = num_moving_[1] > 0 && (num_moving_[0] == 0 || rng_.one_in(2));
  --num_moving_[is_out];
  const std::string before = nodes(tree_);
  tier_->finish(is_out);
  say_all(is_out ? "finish out" : "finish in", before);
}

void TreeFuzz::say_transfers() {
  while (const Transfer* transfer = tier_->next()) {
    ++num_moving_[transfer->is_out];
    if (is_quiet_) continue;
    std::printf("move %s%s /%s\n", transfer->is_out ? "out" : "in", moves(transfer->blocks).c_str(),
                moves(transfer->slots).c_str());
  }
}

void TreeFuzz::say_all(const std::string& what, const std::string& before) const {
  if (is_quiet_) return;
  std::printf("%s |%s |%s |%s\n", what.c_str(), before.c_str(), nodes(tree_).c_str(), nodes(tier_->tree()).c_str());
}

// Each that can be found as SALT/TOKENS/BLOCK/SLOT/KIND.
std::string TreeFuzz::nodes(const PrefixTree& tree) const {
  std::string all;
  for (int32_t id = 1; !is_quiet_ && id <= tree.max_nodes(); ++id) {
    if (tree.node(id).num_tokens == 0 || tree.node(id).is_detached) continue;
    const bool has_snapshot = tree.has_snapshot(id);
    const int32_t slot = has_snapshot ? tree.snapshot(id).ticket.slot() : kDummySlot;
    all += " " + std::to_string(salt_of(tree, id)) + "/" + path(tree, id) + "/" + std::to_string(tree.node(id).block) +
           "/" + std::to_string(slot) + "/";
    if (has_snapshot) all += tree.snapshot(id).kind == SnapshotKind::kAnchor ? "anchor" : "waypoint";
    if (has_snapshot && tree.snapshot(id).has_log) all += "+log";
  }
  return all;
}

}  // namespace headway::sim
