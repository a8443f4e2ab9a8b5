// The prefix cache as planner and ledger see it: what a new request can start from, which states to keep, and what a
// retired step leaves in the tree. Does nothing and costs nothing where the configuration leaves it off.
//
// A row shares the full blocks before its start and writes to blocks of its own from there on, even where the tree
// knows the tokens that follow: no shared block is ever written. A leaf that is shorter than a block moves into the row
// that continues it, with its block and its slot. What a row's chunk has computed enters the tree when its step has
// retired, unless the request was aborted or failed by then. A waiting request whose prefix a running prompt is about
// to leave lets others pass until that is committed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "core/host_tier.h"
#include "core/prefix_tree.h"
#include "core/request.h"
#include "core/row_table.h"

namespace headway {

struct StepDraft;

int32_t num_common_tokens(std::span<const int32_t> a, std::span<const int32_t> b);  // from their beginning

class PrefixCache {
 public:
  PrefixCache(const LedgerConfig& config, const StepClock& clock, BlockPool& blocks, SlotPool& slots, RowTable& rows);

  bool is_on() const { return config_.use_prefix_cache; }

  void open(Request& request, std::string_view salt, bool uses_cache);  // may allocate
  void close(Request& request);

  // Memory that the tree can spare at once, and memory that comes to it with a step in flight.
  int32_t num_evictable_blocks() const { return config_.num_blocks > 0 ? tree_.num_unpinned() : 0; }
  bool is_any_block_coming() const { return !released_.empty() || (host_ && host_->is_moving()); }
  void free_block();  // one more free block, unless the pool has one; needs an evictable block
  bool drop_duplicates();  // of blocks that rows computed again while the tree kept them; true: some may come free

  // What the request could start from now. Valid until the tree changes.
  const PrefixMatch& find(Request& request);
  // Whether a running prompt, or an answer that is over but for steps in flight, will soon leave so much more of the
  // request's prefix that waiting pays.
  bool awaits_prefix(Request& request, const PrefixMatch& match);
  // Of the free and evictable blocks, how many the whole prompt takes.
  int32_t num_blocks_to_admit(const Request& request, const PrefixMatch& match) const;
  bool has_slot(const PrefixMatch& match, int64_t step) const;
  bool has_packet_room(const Request& request, const PrefixMatch& match, const StepDraft& draft) const;

  // Moves ahead of a plan what it might evict to host memory.
  void save_ahead();
  // Whether the request, which could be admitted, waits for what host memory has of its prefix instead.
  bool load(Request& request);

  // Takes a row, which starts behind what find() found. There is room for all of it.
  int32_t admit(Request& request, StepDraft& draft);
  // Gives the row and its memory back; what the tree holds of it stays.
  void release(int32_t row);

  int32_t read_slot(int32_t row, int32_t start) const;
  int32_t num_history(int32_t row, int32_t start) const;
  int32_t history_start(int32_t row) const;  // of what the device knows of the row's tokens

  // Decides which states the step's chunks leave, and remembers what it will publish.
  void note_step(StepDraft& draft, const WaitingQueue& waiting);

  // The step's results are there and valid but for requests that are over or were retracted.
  void publish(int64_t step);
  void retract(Request& request);  // its logits went bad: nothing that it wrote can be found any more
  // Of a request that ends well: its blocks of the first num_tokens, and its slot where their state is to be had.
  void donate(Request& request, int32_t num_tokens, bool has_state);
  // Prompt and output tokens of the request that retired steps have computed.
  int32_t committed_len(const Request& request) const;
  // Whether the row, set back to num_tokens, would write to blocks that are or will be in the tree: of what it was
  // admitted with, or of its output.
  bool is_cached_beyond(const Request& request, int32_t num_tokens) const;
  void retire(int64_t step);
  void reset();

  const PrefixTree& tree() const { return tree_; }
  int32_t num_planned_snapshots() const { return num_planned_[0] + num_planned_[1] + num_moving_slots(); }
  HostTier* host() { return host_.get(); }  // null: there is none
  const HostTier* host() const { return host_.get(); }
  PrefixStats stats() const;
  void check_integrity() const;  // I4, I5, I6

 private:
  struct RowPrefix {
    int32_t node = 0;  // deepest node that the row pins, or a root
    int32_t start = 0;
    int32_t read_slot = kDummySlot;
    int32_t match_len = 0;  // tokens whose KV the tree had
    int32_t prompt_len = 0;  // tokens known at admission
    int32_t committed_len = 0;  // of those
    int32_t decided_len = 0;  // so far it is decided where snapshots are taken
    int64_t last_prompt_step = 0;  // of the final chunk; 0 before it is launched
    bool publishes = false;
  };
  struct Chunk {
    Request* request;
    int32_t row;
    int32_t start;
    int32_t end;
  };
  struct WantedSnapshot {
    int32_t position;
    SnapshotKind kind;
  };
  struct PlannedSnapshot {
    Request* request;
    int32_t row;
    int32_t position;
    SnapshotKind kind;
    bool is_output;  // copied from the row while it decodes, not left by a chunk
    SlotTicket ticket;
  };
  struct StepNotes {
    std::vector<Chunk> chunks;
    std::vector<PlannedSnapshot> snapshots;  // by row, then position
  };
  struct Released {
    int32_t node;
    int64_t last_step;
  };

  // Of the request's tokens, those that it may find.
  std::span<const int32_t> usable(const Request& request) const {
    return std::span<const int32_t>(request.tokens).first(std::max(0, request.num_tokens() - min_computed_));
  }
  StepNotes& notes(int64_t step) { return notes_[step % notes_.size()]; }
  bool takes_leaf(const PrefixMatch& match) const;
  int32_t num_shared_blocks(const PrefixMatch& match) const;
  void count_lookup(Request& request, const PrefixMatch& match);
  SlotTicket take_slot(const PrefixMatch& match, StepDraft& draft, int32_t& read_slot);
  void collect_start_blocks(int32_t path, const PrefixMatch& match);
  int32_t pending_start(int32_t row, int32_t num_common) const;
  int32_t longest_pending(const Request& request) const;

  void plan_snapshots(const Chunk& chunk, int32_t row_index, StepDraft& draft, const WaitingQueue& waiting);
  void collect_positions(const Chunk& chunk, const WaitingQueue& waiting);
  void collect_waypoints(const Chunk& chunk);
  void want(const Chunk& chunk, int32_t position, SnapshotKind kind);
  bool has_given_way(const StepDraft& draft, size_t i) const;
  void plan_output_snapshots(StepDraft& draft);
  int32_t max_held(SnapshotKind kind) const;
  int32_t num_held(SnapshotKind kind) const {
    const int32_t num_moving = kind == SnapshotKind::kAnchor ? num_moving_slots() : 0;
    return tree_.num_snapshots(kind) + num_planned(kind) + num_moving;
  }
  int32_t num_moving_slots() const { return host_ ? host_->num_moving_slots() : 0; }
  int32_t& num_planned(SnapshotKind kind) { return num_planned_[static_cast<size_t>(kind)]; }
  int32_t num_planned(SnapshotKind kind) const { return num_planned_[static_cast<size_t>(kind)]; }
  bool acquire_snapshot(SnapshotKind kind, SlotTicket& ticket);
  void promote(int32_t node);
  void advance(const Chunk& chunk, StepNotes* step_notes);
  bool step_to_child(const Chunk& chunk, uint32_t tag, RowPrefix& prefix);
  bool is_duplicate(int32_t row, int32_t node) const;
  void attach_planned(StepNotes& step_notes, int32_t row, int32_t node);
  void donate_slot(const Chunk& chunk);
  int32_t align_down(int32_t num_tokens) const { return static_cast<int32_t>(num_tokens / unit_ * unit_); }
  void check_rows() const;
  void check_pins() const;
  void check_writes() const;

  const LedgerConfig& config_;
  const StepClock& clock_;
  BlockPool& blocks_;
  SlotPool& slots_;
  RowTable& rows_;
  const bool has_states_;
  const int64_t unit_;  // prompts are matched and snapshots are taken at multiples of it
  const int32_t min_computed_;  // of each prompt: at least the token whose logits are sampled
  PrefixTree tree_;
  std::unique_ptr<HostTier> host_;
  std::vector<RowPrefix> prefixes_;  // [max_rows + 1]
  std::vector<int32_t> prompts_;  // rows whose prompt is not committed
  std::vector<StepNotes> notes_;  // [max_in_flight] by step
  std::vector<Released> released_;  // pinned until their last step has retired
  std::vector<int32_t> start_blocks_;
  std::vector<WantedSnapshot> wanted_;  // in one chunk, those that matter most first
  std::array<int32_t, kNumSnapshotKinds> num_planned_ = {};
  PrefixStats stats_;
};

}  // namespace headway
