// What enters the tree, and when: a prompt's blocks and states with the step that has computed them, outputs at the
// end.
#include <algorithm>
#include <utility>

#include "core/prefix_cache.h"

namespace headway {

void PrefixCache::publish(int64_t step) {
  if (!is_on()) return;
  StepNotes& step_notes = notes(step);
  for (const Chunk& chunk : step_notes.chunks) {
    if (chunk.request->is_finished() || chunk.request->row != chunk.row) continue;
    prefixes_[chunk.row].committed_len = chunk.end;
    advance(chunk, &step_notes);
  }
  for (const PlannedSnapshot& planned : step_notes.snapshots) {
    const Request& request = *planned.request;
    const bool is_void = request.is_finished() || request.row != planned.row || step <= request.void_step;
    if (!planned.is_output || is_void) continue;
    advance({planned.request, planned.row, 0, planned.position}, &step_notes);
  }
}

// Moves the row's node on to the chunk's last full block. Where the tree has no room left it stays behind.
void PrefixCache::advance(const Chunk& chunk, StepNotes* step_notes) {
  RowPrefix& prefix = prefixes_[chunk.row];
  const int32_t begin = tree_.end(prefix.node);
  if (!prefix.publishes || begin + config_.block_size > chunk.end) return;
  const auto tokens = std::span<const int32_t>(chunk.request->tokens).subspan(begin, chunk.end - begin);
  for (TagsAhead tags = tree_.tags_below(prefix.node, tokens); tags.has_next();) {
    if (!step_to_child(chunk, tags.next(), prefix)) return;
    if (step_notes != nullptr) attach_planned(*step_notes, chunk.row, prefix.node);
  }
}

bool PrefixCache::step_to_child(const Chunk& chunk, uint32_t tag, RowPrefix& prefix) {
  const int32_t begin = tree_.end(prefix.node);
  if (begin > 0 && tree_.node(prefix.node).is_detached) {
    prefix.publishes = false;
    return false;
  }
  const auto tokens = std::span<const int32_t>(chunk.request->tokens).subspan(begin, config_.block_size);
  const PrefixTree::Key key{prefix.node, tag, tokens};
  int32_t child = tree_.find_child(key);
  if (child != 0) {
    const bool is_unused = tree_.node(child).num_pins == 0;
    tree_.pin_one(child);
    if (config_.num_blocks > 0 && is_unused && is_duplicate(chunk.row, child)) {
      tree_.replace_block(child, rows_.blocks(chunk.row)[begin / config_.block_size]);
    }
  } else {
    const int32_t block = config_.num_blocks > 0 ? rows_.blocks(chunk.row)[begin / config_.block_size] : kDummyBlock;
    child = tree_.add_child(key, block, chunk.request->id);
  }
  if (child != 0) prefix.node = child;
  return child != 0;
}

void PrefixCache::attach_planned(StepNotes& step_notes, int32_t row, int32_t node) {
  for (PlannedSnapshot& planned : step_notes.snapshots) {
    if (planned.row != row || planned.position != tree_.end(node)) continue;
    const bool is_attached = tree_.attach_snapshot(node, planned.ticket, planned.kind, false);
    stats_.num_snapshots_taken += is_attached;
    if (!is_attached && planned.kind == SnapshotKind::kAnchor) promote(node);
  }
}

void PrefixCache::retract(Request& request) {
  if (request.row == kDummyRow) return;
  RowPrefix& prefix = prefixes_[request.row];
  prefix.publishes = false;
  for (int32_t node = prefix.node; node > 0; node = tree_.node(node).parent) {
    if (tree_.node(node).writer == request.id) tree_.detach(node);
  }
}

int32_t PrefixCache::committed_len(const Request& request) const {
  if (request.row == kDummyRow) return 0;
  const RowPrefix& prefix = prefixes_[request.row];
  return request.num_tokens() > prefix.prompt_len ? request.num_tokens() - 1 : prefix.committed_len;
}

bool PrefixCache::is_cached_beyond(const Request& request, int32_t num_tokens) const {
  if (!is_on() || request.row == kDummyRow) return false;
  const int32_t prompt_len = prefixes_[request.row].prompt_len;
  if (num_tokens < prompt_len) return true;
  // The last token that it keeps is computed again.
  const int32_t cached_len = std::max(prompt_len, tree_.end(prefixes_[request.row].node));
  return num_tokens <= cached_len && rows_.launched_len(request.row) >= num_tokens;
}

void PrefixCache::donate(Request& request, int32_t num_tokens, bool has_state) {
  if (!is_on() || request.row == kDummyRow || !prefixes_[request.row].publishes) return;
  if (!config_.caches_outputs) return;
  const Chunk chunk{&request, request.row, 0, num_tokens};
  advance(chunk, nullptr);
  if (has_states_ && has_state) donate_slot(chunk);
}

// The row's slot becomes the snapshot of its last computed position, in a leaf of its own where that is within a block.
void PrefixCache::donate_slot(const Chunk& chunk) {
  RowPrefix& prefix = prefixes_[chunk.row];
  const int32_t begin = tree_.end(prefix.node);
  const int32_t num_left = chunk.end - begin;
  if (!prefix.publishes || chunk.end == 0 || num_left < 0 || num_left >= config_.block_size) return;
  const auto tokens = std::span<const int32_t>(chunk.request->tokens).subspan(begin, num_left);
  const PrefixTree::Key key = tree_.key(prefix.node, tokens);
  int32_t node = num_left > 0 ? tree_.find_child(key) : prefix.node;
  if (tree_.has_snapshot(node)) return promote(node);
  if (num_held(SnapshotKind::kAnchor) >= max_held(SnapshotKind::kAnchor) &&
      !tree_.evict_snapshot(SnapshotKind::kAnchor)) {
    return;
  }
  if (node == 0) {
    const int32_t block = config_.num_blocks > 0 ? rows_.blocks(chunk.row)[begin / config_.block_size] : kDummyBlock;
    node = tree_.add_child(key, block, chunk.request->id);
    if (node == 0) return;
    prefix.node = node;
  }
  if (!tree_.attach_snapshot(node, rows_.slot_ticket(chunk.row), SnapshotKind::kAnchor, true)) return;
  tree_.hold_snapshot(node, rows_.last_step(chunk.row));  // steps in flight may still add to its log
  ++stats_.num_snapshots_taken;
}

// After the clock: what is dropped here is free at once.
void PrefixCache::retire(int64_t step) {
  if (!is_on()) return;
  StepNotes& step_notes = notes(step);
  for (PlannedSnapshot& planned : step_notes.snapshots) {
    planned.ticket.release(step);
    --num_planned(planned.kind);
  }
  step_notes.chunks.clear();
  step_notes.snapshots.clear();
  std::erase_if(prompts_, [&](int32_t row) {
    const int64_t last_step = prefixes_[row].last_prompt_step;
    return last_step != 0 && last_step <= step;
  });
  std::erase_if(released_, [&](const Released& released) {
    if (released.last_step > step) return false;
    tree_.unpin_path(released.node);
    return true;
  });
}

// What rows still compute may come from other weights, so they leave nothing more.
void PrefixCache::reset() {
  for (RowPrefix& prefix : prefixes_) prefix.publishes = false;
  tree_.reset();
  if (host_) host_->reset();
}

}  // namespace headway
