// The prefix cache's second tier, in host memory: what the tree would evict next moves out ahead of need, and comes
// back when a request begins with it.
//
// A second tree, over blocks and slots of host memory, keeps what has left. It knows the tokens of all nodes above what
// it holds, as ghosts where their blocks are on the device, so a hit compares tokens from the root on, as ever.
//
// Memory moves; nothing is ever shared with a copy that runs. What leaves has left the tree before its copy begins, and
// its block and its slot become free when the copy is done. What returns is copied to a block and a slot of the
// transfer's own, and enters the tree then. A transfer names no memory that a launched step names.
//
// Copies out run in their order, and so do copies back; neither waits for the other, so that a request which waits for
// its prefix does not wait for what others leave. What comes back has therefore arrived before, and is not overwritten
// until it is back. Knows nothing of rows, packets and devices.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <string_view>
#include <vector>

#include "core/prefix_tree.h"
#include "core/request.h"

namespace headway {

struct Transfer {
  bool is_out = false;  // from the device to host memory
  std::vector<RecordMove> blocks = {};
  std::vector<RecordMove> slots = {};
};

class HostTier {
 public:
  // `tree` and `blocks` are the device's, and outlive the tier.
  HostTier(const LedgerConfig& config, const StepClock& clock, PrefixTree& tree, BlockPool& blocks);

  // Moves out what would be evicted first, as long as less is free, or coming, than new requests may soon want.
  // num_spare_anchors: anchors that the tree could take without evicting one.
  void save(int32_t num_spare_anchors);

  // Where in host memory the request could go on, deeper than on the device; 0: nowhere. Changes nothing but what the
  // request remembers of it.
  int32_t find(Request& request, std::span<const int32_t> tokens, const PrefixMatch& match) const;
  int32_t end(int32_t host_node) const { return host_.end(host_node); }
  bool is_loading(const Request& request) const { return request.load_number > loads_.num_finished; }
  // Whether another request has that brought back already.
  bool is_on_its_way(int32_t host_node) const { return host_.node(host_node).num_pins > 0; }
  // Whether its state, and the blocks of what ends behind start, have arrived in host memory.
  bool has_arrived(int32_t host_node, int32_t start) const;
  // Brings it back for the request; `slot` is for its state. As many blocks as are missing can be had.
  void load(Request& request, const PrefixMatch& match, int32_t host_node, SlotTicket slot);

  // The oldest transfer that nobody has been given, back before out; null: there is none.
  const Transfer* next();
  void finish(bool is_out);  // the oldest that was given of those that way

  void reset();  // nothing that is here now, or on its way, is found again

  const PrefixTree& tree() const { return host_; }
  bool is_moving() const { return num_moving() > 0; }
  int64_t num_moving() const { return static_cast<int64_t>(saves_.moves.size() + loads_.moves.size()); }
  int32_t num_moving_slots() const { return num_moving_slots_; }  // of the device
  int64_t num_root_users() const { return static_cast<int64_t>(loads_.moves.size()); }  // of the device's tree
  void count_held(std::vector<int32_t>& num_holders) const;  // of each of the device's blocks
  void count_pins(std::vector<int32_t>& num_pins) const;  // of each of the device's nodes, ancestors included
  void add_to(PrefixStats& stats) const;
  void check_integrity() const;  // I4 and I5 of the tier itself

 private:
  struct Move {
    Transfer transfer = {};
    std::vector<SlotTicket> tickets = {};  // of the device's slots
    // Of what comes back: the deepest nodes on either side, each pinned, or roots, each open.
    int32_t node = 0;
    int32_t host_node = 0;
    int32_t root = 0;
    int32_t host_root = 0;
    bool has_log = false;
    bool is_void = false;  // the cache was emptied meanwhile
  };
  // Transfers one way.
  struct Lane {
    std::deque<Move> moves = {};  // on their way, the oldest first
    int64_t num_pushed = 0;
    int64_t num_given = 0;
    int64_t num_finished = 0;
  };

  bool save_leaves();
  bool save_snapshot();
  bool open_path(int32_t node);
  void close_path();
  bool is_worth_saving(int32_t node) const;
  void move_snapshot(int32_t node, int32_t host_node, Move& move);
  void move_leaf(int32_t node, int32_t host_node, Move& move);
  bool make_host_block();
  bool make_host_slot();
  bool is_read(int32_t host_node) const;
  void push_save(Move&& move);
  void enter(Move& move);
  int32_t find_short(int32_t host_node, std::span<const int32_t> tokens, int32_t after) const;

  const int32_t block_size_;
  const bool has_blocks_;
  const bool has_states_;
  const int32_t num_kept_free_;  // blocks
  const int32_t num_kept_spare_;  // anchors
  const StepClock& clock_;
  PrefixTree& tree_;
  BlockPool& blocks_;
  const LedgerConfig host_config_;
  const StepClock host_clock_;  // stands still: copies out are in order, and who reads is asked
  BlockPool host_blocks_;
  SlotPool host_slots_;
  PrefixTree host_;
  Lane saves_;
  Lane loads_;
  std::vector<int64_t> block_saves_;  // [num_host_blocks + 1] the last copy out to it
  std::vector<int64_t> slot_saves_;  // [num_host_slots + 1] likewise
  std::vector<int32_t> path_;  // of the device's nodes, from the root on, while one is saved
  std::vector<int32_t> host_path_;  // their twins, pinned
  int32_t host_root_ = 0;
  int32_t num_leaving_blocks_ = 0;
  int32_t num_moving_slots_ = 0;
  PrefixStats counts_;
};

}  // namespace headway
