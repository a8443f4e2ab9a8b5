// The invariants of the ledger, by name. A broken one is our own bug, never bad input.
//
//   I1  a block's reference count is the number of block tables and transfers that hold it, and one more if the prefix
//   tree
//      does
//   I2  free + live + fenced is the total, for blocks, slots and rows
//   I3  no id is twice in a free list; free, live and fenced ids are disjoint
//   I6  results are accepted from committed steps only: what a request knows is its prompt and its delivered outputs
//   I7  what a launched step names stays live or fenced until that step has retired
//   I8  no request holds a dummy
//   I9  a ring entry belongs to one step in flight
//   I10 a request ends once, and its outputs are those delivered; its positions only increase
//   I11 when all is over and retired, nothing is live or fenced but what the prefix tree holds, and it can spare all
//   I12 what the device is to be told of a rewound row is where the host believes the row to be
//
// I4, I5 and more of I6 speak of cached prefixes: prefix_check.cpp.
#include <string>

#include "core/error.h"
#include "core/ledger.h"

namespace headway {

void Ledger::check_integrity() const {
  blocks_.ids().check_integrity("blocks");
  slots_.ids().check_integrity("slots");
  rows_.ids().check_integrity("rows");
  check_blocks();
  check_rows();
  check_in_flight();
  check_requests();
  cache_.check_integrity();
  const bool is_moving = cache_.host() != nullptr && cache_.host()->is_moving();
  if (num_unfinished_ == 0 && clock_.num_in_flight() == 0 && !is_moving) check_drained();
}

void Ledger::check_blocks() const {
  std::vector<int32_t> num_tables(config_.num_blocks + 1, 0);
  for (int32_t row = 1; row <= rows_.num_rows(); ++row) {
    if (rows_.request(row) == nullptr) continue;
    for (const int32_t block : rows_.blocks(row)) {
      require_integrity(block != kDummyBlock, "I8: a block table holds the dummy block");
      ++num_tables[block];
    }
  }
  const PrefixTree& tree = cache_.tree();
  for (int32_t node = 1; node <= tree.max_nodes(); ++node)
    num_tables[tree.node(node).block] += tree.node(node).num_tokens > 0;
  if (cache_.host() != nullptr) cache_.host()->count_held(num_tables);
  num_tables[kDummyBlock] = 0;
  for (int32_t block = 1; block <= config_.num_blocks; ++block) {
    require_integrity(num_tables[block] == blocks_.ref_count(block), "I1: a block's count is not its holders'");
    const bool is_live = blocks_.ids().state(block) == FencedPool::State::kLive;
    require_integrity(is_live == (num_tables[block] > 0), "I1: a block is held by nobody, or free and held");
  }
}

void Ledger::check_rows() const {
  int64_t num_held = 0;
  int64_t num_slots = 0;
  for (int32_t row = 1; row <= rows_.num_rows(); ++row) {
    const Request* request = rows_.request(row);
    const bool is_live = rows_.ids().state(row) == FencedPool::State::kLive;
    require_integrity(is_live == (request != nullptr), "I2: a row is held by nobody, or free and held");
    if (request == nullptr) continue;
    ++num_held;
    num_slots += rows_.slot(row) != kDummySlot;
    require_integrity(request->row == row && !request->is_finished(), "I10: a row belongs to another request");
    require_integrity((rows_.slot(row) == kDummySlot) == (config_.num_slots == 0), "I8: a row holds the dummy slot");
    require_integrity(rows_.launched_len(row) <= rows_.bound_len(row), "I10: a position was launched twice");
    require_integrity(rows_.bound_len(row) <= request->max_total_len, "I10: a row runs past its limit");
    require_integrity(rows_.launched_len(row) <= rows_.capacity(row), "I7: a position was launched without a block");
  }
  for (const RowRewind& rewind : rows_.rewinds()) {
    const Request* request = rows_.request(rewind.row);
    require_integrity(request != nullptr && rows_.is_decoding(rewind.row), "I12: a row is rewound that nobody decodes");
    require_integrity(rewind.num_computed == rows_.launched_len(rewind.row) &&
                          rewind.last_token == request->tokens.at(rewind.num_computed),
                      "I12: a row is rewound to another place than the host has it at");
  }
  num_slots += cache_.tree().num_snapshots() + cache_.num_planned_snapshots();
  require_integrity(num_slots == slots_.ids().num_live(), "I2: a slot is held by nobody, or by two");
  require_integrity(num_held == static_cast<int64_t>(rows_.running().size() + rows_.paused().size()),
                    "I10: a row is neither running nor paused");
}

void Ledger::check_in_flight() const {
  std::vector<int32_t> num_samples(rows_.num_rows() + 1, 0);
  const auto is_kept = [](const FencedPool& pool, int32_t id, int64_t step) {
    const auto state = pool.state(id);
    return state == FencedPool::State::kLive || (state == FencedPool::State::kFenced && pool.fence_step(id) >= step);
  };
  for (int64_t step = clock_.retired + 1; step <= clock_.launched; ++step) {
    const StepRecord& launched = record(step);
    require_integrity(launched.step == step, "I9: a ring entry belongs to another step");
    for (size_t i = 0; i < launched.rows.size(); ++i) {
      const int32_t row = launched.rows[i];
      require_integrity(row != kDummyRow, "I8: a step names the dummy row");
      require_integrity(is_kept(rows_.ids(), row, step), "I7: a row was freed under a launched step");
      for (const int32_t block : rows_.blocks(row)) {
        require_integrity(is_kept(blocks_.ids(), block, step), "I7: a block was freed under a launched step");
      }
      const bool is_void = step <= launched.requests[i]->void_step;
      num_samples[row] += static_cast<int32_t>(i) < launched.num_sampled && !is_void;
    }
  }
  for (int32_t row = 1; row <= rows_.num_rows(); ++row) {
    const Request* request = rows_.request(row);
    if (request == nullptr) continue;
    require_integrity(rows_.bound_len(row) == request->num_tokens() + num_samples[row],
                      "I10: a row's length is not its tokens and the samples in flight");
  }
}

void Ledger::check_requests() const {
  int64_t num_unfinished = 0;
  int64_t num_paused = 0;
  int64_t num_waiting = 0;
  int64_t num_salted = 0;
  for (const auto& [id, request] : requests_) {
    num_unfinished += !request->is_finished();
    num_paused += request->state == RequestState::kPaused;
    num_waiting += request->state == RequestState::kWaiting;
    num_salted += request->root != 0;
    require_integrity(request->id == id, "I10: a request is filed under another id");
    require_integrity(request->num_outputs() == request->num_delivered, "I6: outputs are not those delivered");
    require_integrity(request->num_tokens() <= request->max_total_len, "I10: a request is longer than its limit");
    require_integrity(request->is_finished() == (request->finish_reason != FinishReason::kNotFinished),
                      "I10: a request is over without a reason, or has one and is not over");
    require_integrity(waiting_.contains(*request) == (request->state == RequestState::kWaiting),
                      "I10: a request waits outside the queue, or is queued without waiting");
    const bool needs_row = request->state == RequestState::kRunning;
    require_integrity(request->row == kDummyRow ? !needs_row : rows_.request(request->row) == request.get(),
                      "I10: a request's row is not its own");
  }
  require_integrity(num_unfinished == num_unfinished_ && num_paused == num_paused_ && num_waiting == waiting_.size(),
                    "I10: requests are miscounted");
  if (cache_.host() != nullptr) num_salted += cache_.host()->num_root_users();
  require_integrity(num_salted == cache_.tree().num_root_users(), "I4: a root is kept for a request that is over");
  require_integrity(requests_.size() == finished_.size() + num_unfinished, "I10: a request ended twice or not at all");
}

void Ledger::check_drained() const {
  const PrefixTree& tree = cache_.tree();
  require_integrity(tree.num_unpinned() == tree.num_nodes(), "I11: nothing runs, but cached blocks are held");
  const int32_t num_kept[] = {cache_.num_evictable_blocks(), tree.num_snapshots(), 0};
  const FencedPool* pools[] = {&blocks_.ids(), &slots_.ids(), &rows_.ids()};
  for (size_t i = 0; i < std::size(pools); ++i) {
    require_integrity(pools[i]->num_free() + num_kept[i] == pools[i]->num_total(),
                      "I11: nothing runs, but memory is held");
  }
}

}  // namespace headway
