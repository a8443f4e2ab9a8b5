// Which rows run next, under token, row, block and slot budgets. Plans from lengths alone: no token value is read.
//
// Order: running rows that decode, then running prompts, then waiting requests; within each, those that run first come
// first (priority, then arrival). Fenced blocks and those of rows at their last sample count as coming: who lacks a
// block skips the step while any is coming; only then is the row that runs last evicted, never for one it outranks.
#pragma once

#include <cstdint>
#include <vector>

#include "core/prefix_cache.h"
#include "core/row_table.h"

namespace headway {

// A row that learns what it may sample.
struct MaskUpdate {
  int32_t row;
  const Request* request;
};

// A step under construction; the lists' memory is reused from step to step.
struct StepDraft {
  int64_t step = 0;
  std::vector<StepRow> rows;       // decode rows, then final prompt chunks, then other chunks
  std::vector<Request*> requests;  // of the rows; a row may be evicted while its last step is planned
  std::vector<int32_t> admitted;   // rows whose mirror entries are reset
  std::vector<BlockGrant> grants;
  std::vector<StateSnapshot> snapshots;
  std::vector<StateCopy> copies;
  std::vector<RowRewind> rewinds;
  std::vector<MaskUpdate> masks;
  std::vector<ScoredToken> scores;  // in the order of the rows
  std::vector<Request*> scored;     // their requests
  int32_t num_decode_rows = 0;
  int32_t num_sampled = 0;
  int32_t num_tokens = 0;
  int32_t num_words = 0;  // of the admitted rows' stop and bias lists
  int32_t num_prompt_tokens = 0;  // that the packet brings: of the chunks, and history before them
  int32_t num_shared_blocks = 0;  // of the grants, blocks that admitted rows share
  int32_t num_history = 0;        // of the prompt tokens, those that are not computed
  int32_t max_query_len = 0;
  int32_t max_kv_len = 0;
  bool has_news = false;  // false: the device can repeat the rows it has

  void clear(int64_t new_step);
};

class Planner {
 public:
  Planner(const LedgerConfig& config, const StepClock& clock, RowTable& rows, BlockPool& blocks, PrefixCache& cache,
          WaitingQueue& waiting);

  // Plans the step and accounts for it; a draft without rows is not a step and changes no row's lengths.
  const StepDraft& draft(int64_t step);
  const StepDraft& last_draft() const { return draft_; }

  // Takes the row's memory back; its request waits (or stays paused) and will be recomputed. Results still in flight
  // are valid.
  void evict(int32_t row);

  // Whether its prompt, the outputs known at its admission included, has been cut where a sequence of num_tokens leaves
  // too short a rest.
  bool would_end_short(const Request& request, int32_t num_tokens) const;

  int64_t num_evictions() const { return num_evictions_; }
  const std::vector<int32_t>& device_rows() const { return device_rows_; }

 private:
  struct Chunk {
    StepRow row;
    Request* request;
    int32_t first_scored;  // position of the first token that is scored
    int32_t num_scored;
  };

  void plan_decodes();
  void plan_prompts();
  void admit_waiting();
  void admit(Request& request);
  bool add_chunk(int32_t row);
  int32_t cut_chunk(int32_t start, int32_t num_tokens, int32_t num_left) const;
  int32_t least_chunk(int32_t start, int32_t num_left) const;
  void order_rows();
  void add_scores(const Chunk& chunk, int32_t token_begin);
  bool is_held(int32_t row) const;
  void bring_mask(int32_t row);
  int32_t num_scored_in(const Request& request, int32_t start, int32_t num_tokens) const;
  int32_t limit_to_scores(const Request& request, int32_t start, int32_t num_tokens) const;
  void grant_ahead();
  void drop_stale_rewinds();
  bool repeats_device_rows() const;

  int32_t secure(int32_t row, int32_t num_tokens, int32_t min_tokens);
  bool can_hold(int32_t row, int32_t num_tokens) const;
  void grant_up_to(int32_t row, int32_t num_tokens);
  bool make_room(const Request& needy);
  bool is_any_block_coming() const;
  int32_t pick_victim(const Request& needy) const;

  bool fits(Request& request);
  bool displace_for(Request& request);
  int32_t num_available_blocks() const { return blocks_.num_free() + cache_.num_evictable_blocks(); }
  int32_t tokens_left() const { return config_.max_step_tokens - draft_.num_tokens; }
  int32_t blocks_to_finish_prompt(int32_t row) const;

  const LedgerConfig& config_;
  const StepClock& clock_;
  RowTable& rows_;
  BlockPool& blocks_;
  PrefixCache& cache_;
  WaitingQueue& waiting_;
  StepDraft draft_;
  std::vector<Chunk> final_chunks_;
  std::vector<Chunk> other_chunks_;
  std::vector<int32_t> device_rows_;  // the device's live list: rows of the newest packet
  const Request* held_prompt_ = nullptr;  // first running prompt that this step has no room for
  int32_t num_scores_ = 0;            // of the draft, before its rows are ordered
  int32_t promised_blocks_ = 0;       // that running prompts still need until they are computed
  int64_t num_evictions_ = 0;
};

}  // namespace headway
