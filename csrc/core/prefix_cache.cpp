#include "core/prefix_cache.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/planner.h"

namespace headway {
namespace {

// Waiting for a running prompt pays where it spares a request one part in so many of what it has to compute.
constexpr int32_t kPartsPerWait = 4;

// Whether tokens before the first one computed decide how the row samples.
bool samples_by_history(const RowSampling& sampling) {
  if (sampling.num_bad_words > 0) return true;
  return sampling.repetition_penalty != 1.0f || sampling.presence_penalty != 0.0f || sampling.frequency_penalty != 0.0f;
}

}  // namespace

int32_t num_common_tokens(std::span<const int32_t> a, std::span<const int32_t> b) {
  constexpr size_t kStride = 64;
  const size_t length = std::min(a.size(), b.size());
  size_t i = 0;
  while (i + kStride <= length && std::memcmp(&a[i], &b[i], kStride * sizeof(int32_t)) == 0) i += kStride;
  while (i < length && a[i] == b[i]) ++i;
  return static_cast<int32_t>(i);
}

PrefixCache::PrefixCache(const LedgerConfig& config, const StepClock& clock, BlockPool& blocks, SlotPool& slots,
                         RowTable& rows)
    : config_(config),
      clock_(clock),
      blocks_(blocks),
      slots_(slots),
      rows_(rows),
      has_states_(config.num_slots > 0),
      unit_(config.prefix_unit_tokens()),
      min_computed_(config.caches_outputs ? 1 : config.min_last_chunk_tokens),
      tree_(config, clock, blocks),
      prefixes_(config.max_rows + 1),
      notes_(config.max_in_flight()) {
  if (!is_on()) return;
  if (config.has_host_tier()) host_ = std::make_unique<HostTier>(config, clock, tree_, blocks);
  prompts_.reserve(config.max_rows);
  released_.reserve(config.max_rows);
  start_blocks_.reserve(config.max_blocks_per_row());
  wanted_.reserve(config.max_packet_snapshots());
  for (StepNotes& step_notes : notes_) {
    step_notes.chunks.reserve(config.max_rows);
    step_notes.snapshots.reserve(config.max_packet_snapshots() + config.max_rows);
  }
}

void PrefixCache::open(Request& request, std::string_view salt, bool uses_cache) {
  if (is_on() && uses_cache) request.root = tree_.open_root(salt);
}

void PrefixCache::close(Request& request) {
  if (request.root != 0) tree_.close_root(request.root);
  request.root = 0;
}

void PrefixCache::free_block() {
  if (blocks_.num_free() == 0) tree_.evict_leaf();
}

// The tree goes over to the row's block, so that a row alone never holds more than its own. Nobody reads the one that
// goes: no row has it, and none that had it has a step in flight.
bool PrefixCache::drop_duplicates() {
  bool has_dropped = false;
  if (!is_on() || config_.num_blocks == 0 || is_any_block_coming()) return false;
  for (int32_t row = 1; row <= rows_.num_rows(); ++row) {
    for (int32_t node = prefixes_[row].node; tree_.end(node) > prefixes_[row].start; node = tree_.node(node).parent) {
      if (!is_duplicate(row, node) || blocks_.ref_count(tree_.node(node).block) > 1) continue;
      tree_.replace_block(node, rows_.blocks(row)[tree_.end(node) / config_.block_size - 1]);
      has_dropped = true;
    }
  }
  return has_dropped;
}

bool PrefixCache::is_duplicate(int32_t row, int32_t node) const {
  return rows_.blocks(row)[(tree_.end(node) - 1) / config_.block_size] != tree_.node(node).block;
}

const PrefixMatch& PrefixCache::find(Request& request) {
  if (request.root == 0 || request.match_version == tree_.version()) return request.match;
  request.match = tree_.match(request.root, usable(request));
  request.match_version = tree_.version();
  return request.match;
}

bool PrefixCache::awaits_prefix(Request& request, const PrefixMatch& match) {
  request.awaits_prefix = false;
  if (request.root == 0) return false;
  if (host_ && host_->is_loading(request)) return request.awaits_prefix = true;
  const int64_t num_spared = std::max(longest_pending(request), match.held_start) - match.start;
  if (num_spared <= 0 || num_spared * kPartsPerWait < request.num_tokens() - match.start) return false;
  request.awaits_prefix = true;
  stats_.num_waits += !std::exchange(request.has_awaited_prefix, true);
  return true;
}

void PrefixCache::save_ahead() {
  if (!host_) return;
  host_->save(max_held(SnapshotKind::kAnchor) - num_held(SnapshotKind::kAnchor));
}

// Once for each admission, so that memory which is too short for what comes back keeps nobody waiting for ever.
bool PrefixCache::load(Request& request) {
  if (!host_ || request.root == 0 || request.load_number != 0) return false;
  const PrefixMatch match = find(request);
  const int32_t node = host_->find(request, usable(request), match);
  const int64_t num_spared = host_->end(node) - match.start;
  if (node == 0 || num_spared * kPartsPerWait < request.num_tokens() - match.start) return false;
  if (host_->is_on_its_way(node) || !host_->has_arrived(node, match.num_tokens)) return request.awaits_prefix = true;
  SlotTicket slot;
  if (has_states_ && !acquire_snapshot(SnapshotKind::kAnchor, slot)) return false;
  if (has_states_) --num_planned(SnapshotKind::kAnchor);  // it counts as moving
  host_->load(request, match, node, std::move(slot));
  return request.awaits_prefix = true;
}

// Only those that run before the request count, so that nobody is passed for ever.
int32_t PrefixCache::longest_pending(const Request& request) const {
  int32_t longest = 0;
  for (const int32_t row : prompts_) {
    const Request* leader = rows_.request(row);
    if (leader->root != request.root || leader->state != RequestState::kRunning) continue;
    if (leader->is_held_at(rows_.bound_len(row))) continue;
    if (!prefixes_[row].publishes || !RunsBefore{}(leader, &request)) continue;
    const auto known = std::span<const int32_t>(leader->tokens).first(prefixes_[row].prompt_len);
    longest = std::max(longest, pending_start(row, num_common_tokens(known, usable(request))));
  }
  return longest;
}

// Where a request could start that shares so many tokens with the row's prompt, once that is committed.
int32_t PrefixCache::pending_start(int32_t row, int32_t num_common) const {
  const int32_t best = align_down(num_common);
  if (!has_states_ || best > prefixes_[row].decided_len) return best;
  int32_t planned = 0;
  for (int64_t step = clock_.retired + 1; step <= clock_.launched; ++step) {
    for (const PlannedSnapshot& snapshot : notes_[step % notes_.size()].snapshots) {
      if (snapshot.row == row && snapshot.position <= num_common) planned = std::max(planned, snapshot.position);
    }
  }
  return planned;
}

// A leaf that goes on in its own block can belong to one row only.
bool PrefixCache::takes_leaf(const PrefixMatch& match) const {
  return config_.num_blocks > 0 && match.start % config_.block_size != 0;
}

int32_t PrefixCache::num_shared_blocks(const PrefixMatch& match) const {
  return config_.blocks_for(match.start);
}

int32_t PrefixCache::num_blocks_to_admit(const Request& request, const PrefixMatch& match) const {
  const int32_t num_unpinned = config_.num_blocks > 0 ? tree_.num_unpinned_to(match.start_node) : 0;
  return config_.blocks_for(request.num_tokens()) - num_shared_blocks(match) + num_unpinned;
}

// A slot is free or can be freed; or the start's own slot can be taken, unless another row of the same step reads it.
bool PrefixCache::has_slot(const PrefixMatch& match, int64_t step) const {
  if (slots_.has_room() || takes_leaf(match) || tree_.can_evict_snapshot(match.start_node)) return true;
  return match.start_node != 0 && tree_.snapshot(match.start_node).last_step < step;
}

bool PrefixCache::has_packet_room(const Request& request, const PrefixMatch& match, const StepDraft& draft) const {
  const bool needs_history = samples_by_history(request.sampling);
  if (needs_history && draft.num_history + match.start > config_.max_model_len) return false;
  return draft.num_shared_blocks + num_shared_blocks(match) <= config_.max_packet_shared_blocks();
}

int32_t PrefixCache::admit(Request& request, StepDraft& draft) {
  const PrefixMatch match = find(request);
  count_lookup(request, match);
  request.load_number = 0;
  const bool is_short = match.start % config_.block_size != 0;
  const int32_t path = is_short ? tree_.node(match.start_node).parent : match.start_node;
  tree_.pin_path(path);
  RowPrefix prefix{.node = path != 0 ? path : request.root,
                   .start = match.start,
                   .match_len = match.num_tokens,
                   .prompt_len = request.num_tokens(),
                   .committed_len = match.start,
                   .decided_len = match.start,
                   .publishes = request.root != 0};
  SlotTicket slot = take_slot(match, draft, prefix.read_slot);
  // Prompts part here: what was kept on the way turns out to be where a state belongs.
  if (match.start_node > 0 && align_down(match.num_tokens) == match.start) promote(match.start_node);
  collect_start_blocks(path, match);
  const int32_t row =
      rows_.admit(request, {.num_tokens = match.start, .slot = std::move(slot), .blocks = start_blocks_});
  for (size_t i = 0; i < start_blocks_.size(); ++i) {
    draft.grants.push_back({row, static_cast<int32_t>(i), start_blocks_[i]});
  }
  draft.num_shared_blocks += static_cast<int32_t>(start_blocks_.size());
  draft.num_history += samples_by_history(request.sampling) ? match.start : 0;
  prefixes_[row] = prefix;
  if (prefix.publishes) prompts_.push_back(row);
  return row;
}

// Copy-free: a snapshot is read where it is and the row writes to a slot of its own; or the row takes the slot itself.
SlotTicket PrefixCache::take_slot(const PrefixMatch& match, StepDraft& draft, int32_t& read_slot) {
  if (match.start_node == 0 || !has_states_) {
    if (!slots_.has_room()) tree_.evict_snapshot();
    return slots_.acquire();
  }
  const int32_t slot = tree_.read_snapshot(match.start_node, draft.step);
  if (tree_.snapshot(match.start_node).has_log) {
    draft.copies.push_back({slot, slot, match.start, 0});
    tree_.clear_log(match.start_node);
  }
  read_slot = slot;
  const bool is_shared = !takes_leaf(match) && (slots_.has_room() || tree_.evict_snapshot(match.start_node));
  return is_shared ? slots_.acquire() : tree_.take_snapshot(match.start_node);
}

// The row's references: one more for each shared block, and the leaf's own.
void PrefixCache::collect_start_blocks(int32_t path, const PrefixMatch& match) {
  start_blocks_.assign(config_.num_blocks > 0 ? tree_.end(path) / config_.block_size : 0, kDummyBlock);
  for (size_t i = start_blocks_.size(); i > 0; path = tree_.node(path).parent) {
    start_blocks_[--i] = tree_.node(path).block;
    blocks_.share(start_blocks_[i]);
  }
  if (takes_leaf(match)) start_blocks_.push_back(tree_.take_leaf(match.start_node));
}

// Requests are counted when they are first admitted.
void PrefixCache::count_lookup(Request& request, const PrefixMatch& match) {
  if (request.root == 0 || request.num_evictions > 0) return;
  request.num_cached_tokens = match.start;
  stats_.num_host_hits += request.loaded_start > 0 && match.start >= request.loaded_start;
  const auto reusable = usable(request);
  ++stats_.num_lookups;
  stats_.num_prompt_tokens += request.num_tokens();
  stats_.num_cached_tokens += match.start;
  if (match.start > 0) {
    ++stats_.num_hits;
  } else if (std::ssize(reusable) < unit_) {
    ++stats_.num_too_short;
  } else if (longest_pending(request) > 0) {
    ++stats_.num_pending;
  } else if (match.num_tokens > 0) {
    ++stats_.num_without_snapshot;
  } else if (tree_.is_known_elsewhere(request.root, reusable)) {
    ++stats_.num_other_salt;
  } else {
    ++stats_.num_without_kv;
  }
}

void PrefixCache::release(int32_t row) {
  RowPrefix& prefix = prefixes_[row];
  const int64_t last_step = rows_.last_step(row);
  rows_.release(row);
  if (!is_on()) return;
  std::erase(prompts_, row);
  const int32_t node = std::exchange(prefix, {}).node;
  if (node <= 0) return;
  if (clock_.has_retired(last_step)) {
    tree_.unpin_path(node);
  } else {
    released_.push_back({node, last_step});
  }
}

int32_t PrefixCache::read_slot(int32_t row, int32_t start) const {
  const RowPrefix& prefix = prefixes_[row];
  const bool is_restored = prefix.read_slot != kDummySlot && start == prefix.start;
  return is_restored ? prefix.read_slot : rows_.slot(row);
}

int32_t PrefixCache::history_start(int32_t row) const {
  return samples_by_history(rows_.request(row)->sampling) ? 0 : prefixes_[row].start;
}

int32_t PrefixCache::num_history(int32_t row, int32_t start) const {
  const bool is_first = start > 0 && start == prefixes_[row].start;
  return is_first && samples_by_history(rows_.request(row)->sampling) ? start : 0;
}

PrefixStats PrefixCache::stats() const {
  PrefixStats stats = stats_;
  stats.num_blocks = config_.num_blocks > 0 ? tree_.num_nodes() : 0;
  stats.num_evictable_blocks = num_evictable_blocks();
  stats.num_snapshots = tree_.num_snapshots();
  stats.num_waypoints = tree_.num_snapshots(SnapshotKind::kWaypoint);
  stats.num_evicted_blocks = config_.num_blocks > 0 ? tree_.num_evicted_nodes() : 0;
  stats.num_evicted_snapshots = tree_.num_evicted_snapshots();
  if (host_) host_->add_to(stats);
  return stats;
}

}  // namespace headway
