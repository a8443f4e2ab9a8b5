// What the host and the device say to each other, byte for byte. Plain data only: the ledger writes packets and
// reads results, CPU and CUDA kernels do the opposite, tests build both by hand. No containers, no CUDA, no torch.
#pragma once

#include <cstdint>

#include "core/state_base.h"

namespace headway {

// Row 0, block 0 and slot 0 are dummies: padding reads and writes them and nothing else.
inline constexpr int32_t kDummyRow = 0;
inline constexpr int32_t kDummyBlock = 0;
inline constexpr int32_t kDummySlot = 0;

// Capacity of the per-row lists in the device mirror; longer lists are refused when a request is submitted.
inline constexpr int32_t kMaxStopIds = 64;
inline constexpr int32_t kMaxLogitBias = 512;
inline constexpr int32_t kMaxBadWordEntries = 1024;  // where each bad word ends, then the tokens of all

// RowSampling::flags.
inline constexpr int32_t kHasTokenMask = 1;        // DeviceMirror::token_masks says what may be sampled
inline constexpr int32_t kProcessedLogprobs = 2;   // logprobs are of the logits that are sampled, not of the model's

// How one row samples. A field's neutral value switches its feature off.
struct RowSampling {
  uint64_t seed;             // the sample at position p is a pure function of (seed, p)
  float temperature;         // 0 = greedy
  float top_p;               // (0, 1], 1 = off
  float min_p;               // [0, 1], 0 = off
  int32_t top_k;             // 0 = off
  float repetition_penalty;  // > 0, 1 = off; over prompt and output
  float presence_penalty;    // 0 = off; over output
  float frequency_penalty;   // 0 = off; over output
  int32_t prompt_len;        // tokens; output starts at this position
  int32_t min_total_len;     // below this many tokens in the sequence, stop ids cannot be sampled
  int32_t max_total_len;     // at this many tokens the row stops for length
  int32_t num_stop_ids;      // entries used in DeviceMirror::stop_ids
  int32_t num_logit_bias;    // entries used in DeviceMirror::bias_ids and bias_values
  int32_t num_logprobs;      // top alternatives to report; -1 = not even the chosen token's
  int32_t num_prompt_logprobs;  // the same for the tokens of the prompt
  int32_t num_bad_words;        // token sequences in DeviceMirror::bad_words that must not be completed
  int32_t num_bad_word_tokens;  // of all of them
  int32_t flags;
  int32_t reserved;
};
static_assert(sizeof(RowSampling) == 80, "RowSampling is copied raw to the device");

// A packet is PacketHeader, then the sections it names, each 16-byte aligned, in the order of the offsets:
//   RowInit[num_inits] | int32 words[num_words] | BlockGrant[num_grants] | StepRow[num_rows] |
//   int32 prompt_tokens[num_prompt_tokens] | StateSnapshot[num_snapshots] | StateCopy[num_copies] |
//   RowRewind[num_rewinds] | int32 mask_rows[num_masks] | uint32 mask_bits[num_masks, DeviceMirror::mask_words] |
//   ScoredToken[num_scored]
struct PacketHeader {
  int64_t step;
  int32_t num_rows;  // R: live rows of the step; the first num_decode_rows decode one token each
  int32_t num_decode_rows;
  int32_t num_sampled;  // the first num_sampled rows sample a token: decode rows, then final prompt chunks
  int32_t num_tokens;   // T: sum of the rows' tokens
  int32_t num_inits;
  int32_t num_words;
  int32_t num_grants;
  int32_t num_prompt_tokens;  // num_tokens - num_decode_rows, and the rows' num_history
  int32_t num_snapshots;
  int32_t num_copies;
  int32_t num_rewinds;
  int32_t num_masks;
  int32_t num_scored;
  uint32_t inits_offset;  // bytes from the header's first byte, likewise below
  uint32_t words_offset;
  uint32_t grants_offset;
  uint32_t rows_offset;
  uint32_t tokens_offset;
  uint32_t snapshots_offset;
  uint32_t copies_offset;
  uint32_t rewinds_offset;
  uint32_t mask_rows_offset;
  uint32_t mask_bits_offset;
  uint32_t scores_offset;
  uint32_t num_bytes;  // of the whole packet
  int32_t reserved;
};
static_assert(sizeof(PacketHeader) == 112, "PacketHeader is copied raw to the device");

// A row is (re)admitted: its mirror entries are reset. Its stop ids, bias ids, bias values (float bits), bad words'
// ends and tokens follow each other in the words section from words_begin.
struct RowInit {
  int32_t row;
  int32_t slot;  // kDummySlot when the model keeps no state
  int32_t words_begin;
  int32_t reserved;
  RowSampling sampling;
};
static_assert(sizeof(RowInit) == 96, "RowInit is copied raw to the device");

// block_table[row][index] = block.
struct BlockGrant {
  int32_t row;
  int32_t index;
  int32_t block;
};

// One row of the step. A decode row's token and position come from the mirror; a prompt chunk's from the packet.
struct StepRow {
  int32_t row;
  int32_t start;  // absolute position of the chunk's first token; decode rows: what the host believes
  int32_t num_tokens;
  int32_t prompt_begin;  // index of the chunk's first token in prompt_tokens; -1 for a decode row
  int32_t read_slot;     // whose state the chunk's first token continues from: the row's own, or a snapshot's
  // So many of the tokens right before `start` lie right before prompt_begin: they are not computed, because their KV
  // and state are there already, but become part of the row's history. 0 where the row samples without its history.
  int32_t num_history;
};
static_assert(sizeof(StepRow) == 24, "StepRow is copied raw to the device");

// While a prompt chunk is computed, the convolution columns and the SSM state after `position` tokens go to `slot`.
// Sorted by row, then position; a row's positions differ.
struct StateSnapshot {
  int32_t row_index;  // into the step's rows
  int32_t position;  // absolute: in (start, start + num_tokens], on the grid of prompt cuts or the chunk's end
  int32_t slot;
  int32_t reserved;
};

// Before the step's layers run, the state in src_slot, which has seen `position` tokens, is written to dst_slot, in all
// layers. Source and target may be the same slot; else no copy's target is another copy's source or target. Of a row
// that has stopped on the device before that position, the target gets a state of no use, which nobody reads.
struct StateCopy {
  int32_t src_slot;
  int32_t dst_slot;
  int32_t position;
  int32_t reserved;
};

// A record of a pool, a KV block or a state slot, goes to another of the other pool's.
struct RecordMove {
  int32_t source;
  int32_t target;
};
static_assert(sizeof(RecordMove) == 8, "RecordMove is copied raw to the device");

// The row goes back to num_computed tokens and continues with last_token, whatever it sampled since; it has not
// stopped.
struct RowRewind {
  int32_t row;
  int32_t num_computed;
  int32_t last_token;
  int32_t reserved;
};

// A token of a prompt whose logits say how likely the next one was.
struct ScoredToken {
  int32_t token_index;  // into the step's tokens
  int32_t row;  // row id
  int32_t target;  // the next token
  int32_t reserved;
};

// What the device counts by itself, so that a replayed graph needs no new arguments: begin_step sets it, finish_step
// reads it.
struct StepCounter {
  int64_t step;  // of the step running, or run last; a step without a packet follows the one before
  int64_t begin_ns;  // device clock when it began; 0 where the device has no clock
  int32_t num_live;  // live rows of the newest packet; rows of a step beyond them are padding
  int32_t num_sampled;  // rows of the step that sample, padding not counted
};
static_assert(sizeof(StepCounter) == 24, "StepCounter is allocated by the host as raw bytes");

// The mirror: what the device keeps of every row, at fixed addresses, and advances by itself. Row-indexed arrays
// have max_rows entries; entry 0 is the dummy row.
struct DeviceMirror {
  int32_t max_rows;
  int32_t max_blocks_per_row;
  int32_t max_model_len;
  int32_t mask_words;  // 32-bit words of a token mask: ceil(V / 32)
  StateWindow state_window;
  int32_t* last_token;  // [max_rows] sampled last; the next step's input
  int32_t* num_computed;  // [max_rows] tokens whose KV and state are written: the next position to compute
  int32_t* state_base;  // [num_slots] tokens folded into the state that the slot holds
  int32_t* slot;  // [max_rows]
  int32_t* stopped;  // [max_rows] 1 once the device saw an end token or the length limit
  int32_t* block_table;  // [max_rows, max_blocks_per_row]
  int32_t* history;  // [max_rows, max_model_len] every token, by position
  RowSampling* sampling;  // [max_rows]
  int32_t* stop_ids;  // [max_rows, kMaxStopIds]
  int32_t* bias_ids;  // [max_rows, kMaxLogitBias]
  float* bias_values;  // [max_rows, kMaxLogitBias]
  int32_t* bad_words;  // [max_rows, kMaxBadWordEntries] end offsets into the tokens behind them, tokens
  uint32_t* token_masks;  // [max_rows, mask_words] bit v % 32 of word v / 32: token v may be sampled
  StepRow* live;  // [max_rows] rows of the newest packet: repeated when a step brings no packet
  StepCounter* counter = nullptr;  // [1], step one before the first; null: no timestamps, no padding, no replay
};

// What begin_step derives for the layers; [] sizes are those of this step, buffers are as large as the largest step.
struct StepInputs {
  int32_t* token_ids;  // [T]
  int32_t* positions;  // [T] absolute
  int32_t* token_rows;  // [T] index into the step's rows, 0..R-1
  int32_t* rows;  // [R] row id; kDummyRow for a row the device has stopped
  int32_t* query_start;  // [R + 1] prefix sums of the rows' tokens
  int32_t* row_start;  // [R] absolute position of the row's first token in this step
  int32_t* kv_lens;  // [R] row_start + its tokens
  int32_t* read_slots;  // [R] where the row's state is before the step; kDummySlot for a stopped row
  int32_t* write_slots;  // [R] where it goes: the row's own slot
  int32_t* state_base;  // [R] tokens folded into the state in read_slots
  int32_t* sample_tokens;  // [num_sampled] index into [T] of the token whose logits are sampled
  // Written only by a step whose packet has snapshots; those of a stopped row are left out.
  int32_t* snapshot_starts;  // [R + 1] the row's first entry in the two lists below
  int32_t* snapshot_positions;  // [num_snapshots] as in StateSnapshot
  int32_t* snapshot_slots;  // [num_snapshots]
  // Likewise, the packet's scored tokens.
  int32_t* score_tokens;  // [num_scored] index into [T]
  int32_t* score_rows;  // [num_scored] row ids
  int32_t* score_targets;  // [num_scored]
};

// One sampled token on its way back.
struct ResultRow {
  int32_t row;  // row id, kDummyRow for a row that had already stopped on the device
  int32_t token;
  float logprob;  // of the chosen token, before temperature and penalties
  int32_t rank;  // 1 = most likely
  int32_t is_stopped;  // the device's own verdict; the host repeats it and compares
  int32_t is_bad;  // logits had NaN or +inf: the token is void and the row must end with an error
};

// One entry of the result ring: ResultHeader, then ResultRow[max_results], then int32 top_ids[max_results,
// max_logprobs], then float top_logprobs[max_results, max_logprobs]; sampled rows come first, then scored tokens, of
// which there are only row, token, logprob, rank and is_bad. `step` is written last, with release order: when it equals
// the awaited step, the whole entry is there.
struct ResultHeader {
  int64_t step;
  int64_t begin_ns;  // device clock when the step began and ended; 0 where the device has no clock
  int64_t end_ns;
  int32_t num_sampled;
  int32_t num_scored;
  int32_t reserved[8];
};
static_assert(sizeof(ResultHeader) == 64, "ResultHeader is read raw from the device");

}  // namespace headway
