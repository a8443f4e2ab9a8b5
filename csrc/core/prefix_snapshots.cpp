// Where snapshots are taken. Anchors: at a prompt's last usable boundary, where the tree knows it to part from another,
// where a waiting request will part from it. Waypoints: at a stride, and closer near the prompt's ends, for those that
// nobody knows yet; in outputs at a stride of their own.
#include <algorithm>
#include <numeric>

#include "core/planner.h"
#include "core/prefix_cache.h"

namespace headway {
namespace {

constexpr int32_t kNumWaitingSeen = 16;  // requests of the queue's head whose prompts are compared
// A prompt takes no more than one part in so many of all waypoints.
constexpr int32_t kPromptsOfWaypoints = 2;

}  // namespace

void PrefixCache::note_step(StepDraft& draft, const WaitingQueue& waiting) {
  if (!is_on()) return;
  if (config_.decode_snapshot_stride_tokens > 0 && has_states_ && config_.caches_outputs) plan_output_snapshots(draft);
  StepNotes& step_notes = notes(draft.step);
  for (size_t i = draft.num_decode_rows; i < draft.rows.size(); ++i) {
    if (has_given_way(draft, i)) continue;
    const StepRow& row = draft.rows[i];
    RowPrefix& prefix = prefixes_[row.row];
    const Chunk chunk{draft.requests[i], row.row, row.start, row.start + row.num_tokens};
    step_notes.chunks.push_back(chunk);
    if (chunk.end == prefix.prompt_len) prefix.last_prompt_step = draft.step;
    if (has_states_ && prefix.publishes) plan_snapshots(chunk, static_cast<int32_t>(i), draft, waiting);
    prefix.decided_len = chunk.end;
  }
}

void PrefixCache::plan_snapshots(const Chunk& chunk, int32_t row_index, StepDraft& draft, const WaitingQueue& waiting) {
  std::vector<PlannedSnapshot>& planned = notes(draft.step).snapshots;
  const size_t num_before = planned.size();
  collect_positions(chunk, waiting);
  for (const WantedSnapshot& wanted : wanted_) {
    const auto num_in_packet = static_cast<int32_t>(draft.snapshots.size() + planned.size() - num_before);
    SlotTicket ticket;
    if (num_in_packet == config_.max_packet_snapshots()) break;
    if (!acquire_snapshot(wanted.kind, ticket)) continue;
    planned.push_back({chunk.request, chunk.row, wanted.position, wanted.kind, false, std::move(ticket)});
  }
  const auto first = planned.begin() + static_cast<std::ptrdiff_t>(num_before);
  std::sort(first, planned.end(), [](const auto& a, const auto& b) { return a.position < b.position; });
  for (auto i = first; i != planned.end(); ++i) {
    draft.snapshots.push_back({row_index, i->position, i->ticket.slot(), 0});
  }
}

// Those that matter most first.
void PrefixCache::collect_positions(const Chunk& chunk, const WaitingQueue& waiting) {
  wanted_.clear();
  const RowPrefix& prefix = prefixes_[chunk.row];
  const auto prompt = std::span<const int32_t>(chunk.request->tokens).first(prefix.prompt_len);
  int32_t num_seen = 0;
  for (const Request* other : waiting.requests()) {
    if (++num_seen > kNumWaitingSeen) break;
    if (other->root != chunk.request->root) continue;
    want(chunk, align_down(num_common_tokens(prompt, usable(*other))), SnapshotKind::kAnchor);
  }
  want(chunk, align_down(prefix.match_len), SnapshotKind::kAnchor);
  want(chunk, align_down(prefix.prompt_len - min_computed_), SnapshotKind::kAnchor);
  if (config_.snapshot_stride_tokens > 0 && config_.max_waypoints > 0) collect_waypoints(chunk);
}

void PrefixCache::want(const Chunk& chunk, int32_t position, SnapshotKind kind) {
  const auto is_there = [position](const WantedSnapshot& wanted) { return wanted.position == position; };
  if (position <= chunk.start || position > chunk.end || wanted_.size() == wanted_.capacity()) return;
  if (std::ranges::none_of(wanted_, is_there)) wanted_.push_back({position, kind});
}

// At the stride, which doubles until the prompt's share holds it, so that prompts of any length meet at its multiples;
// at distances that double from the first token on; and so back from the last boundary, while that makes no more than
// one in half a stride. A prompt that parts from this one computes again less than a stride, half of what they share,
// or about what follows in this one: whichever is least.
void PrefixCache::collect_waypoints(const Chunk& chunk) {
  const RowPrefix& prefix = prefixes_[chunk.row];
  const int64_t last = align_down(prefix.prompt_len - min_computed_);
  const int64_t unscaled = std::max(unit_, config_.snapshot_stride_tokens / unit_ * unit_);
  const int64_t share = std::max(1, config_.max_waypoints / kPromptsOfWaypoints);
  int64_t stride = unscaled;
  while ((last - prefix.start) / stride > share) stride *= 2;
  int64_t num_wanted = 0;
  const auto visit = [&](int64_t position) {
    if (position <= prefix.start || position >= last || num_wanted == share) return;
    ++num_wanted;
    want(chunk, static_cast<int32_t>(position), SnapshotKind::kWaypoint);
  };
  for (int64_t position = prefix.start / stride * stride + stride; position < last; position += stride) visit(position);
  for (int64_t position = unit_; position < unscaled; position *= 2) visit(position);
  const int64_t most = 1 + (last - prefix.start) * 2 / unscaled;
  for (int64_t distance = unit_; distance < unscaled && num_wanted < most; distance *= 2) visit(last - distance);
}

// Whether the row of the draft was evicted while this step was planned.
bool PrefixCache::has_given_way(const StepDraft& draft, size_t i) const {
  return rows_.request(draft.rows[i].row) != draft.requests[i];
}

// A row that decodes leaves its state before the step, behind a copy's fold: nothing else writes it meanwhile.
void PrefixCache::plan_output_snapshots(StepDraft& draft) {
  const int64_t stride = std::max(unit_, config_.decode_snapshot_stride_tokens / unit_ * unit_);
  for (int32_t i = 0; i < draft.num_decode_rows; ++i) {
    const StepRow& row = draft.rows[i];
    if (row.start % stride != 0 || has_given_way(draft, i) || !prefixes_[row.row].publishes) continue;
    SlotTicket ticket;
    if (!acquire_snapshot(SnapshotKind::kWaypoint, ticket)) continue;
    draft.copies.push_back({rows_.slot(row.row), ticket.slot(), row.start, 0});
    notes(draft.step)
        .snapshots.push_back({draft.requests[i], row.row, row.start, SnapshotKind::kWaypoint, true, std::move(ticket)});
  }
}

int32_t PrefixCache::max_held(SnapshotKind kind) const {
  return kind == SnapshotKind::kWaypoint ? config_.max_waypoints : config_.max_snapshots - config_.max_waypoints;
}

// One slot within the kind's share, at an older snapshot's expense where none is free.
bool PrefixCache::acquire_snapshot(SnapshotKind kind, SlotTicket& ticket) {
  if (num_held(kind) >= max_held(kind) && !tree_.evict_snapshot(kind)) return false;
  const bool is_waypoint = kind == SnapshotKind::kWaypoint;
  if (!slots_.has_room() && !(is_waypoint ? tree_.evict_snapshot(kind) : tree_.evict_snapshot())) return false;
  ticket = slots_.acquire();
  ++num_planned(kind);
  return true;
}

// A waypoint that proves to be where a snapshot belongs becomes an anchor, if there is room for one more.
void PrefixCache::promote(int32_t node) {
  constexpr auto kAnchor = SnapshotKind::kAnchor;
  if (!tree_.has_snapshot(node) || tree_.snapshot(node).kind == kAnchor) return;
  if (num_held(kAnchor) >= max_held(kAnchor) && !tree_.evict_snapshot(kAnchor)) return;
  tree_.make_anchor(node);
}

}  // namespace headway
