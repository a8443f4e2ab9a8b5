// First op of a step: applies the packet to the mirror, then derives the layers' inputs. Knows nothing of the model.
#include <algorithm>
#include <cstring>

#include "cpu/ops.h"

namespace headway::cpu {
namespace {

template <class T>
const T* section(const uint8_t* packet, uint32_t offset) {
  return reinterpret_cast<const T*>(packet + offset);
}

void apply_init(const DeviceMirror& mirror, const RowInit& init, const int32_t* words) {
  const int64_t row = init.row;
  const RowSampling& sampling = init.sampling;
  mirror.last_token[row] = 0;
  mirror.num_computed[row] = 0;
  mirror.stopped[row] = 0;
  mirror.slot[row] = init.slot;
  mirror.sampling[row] = sampling;
  const int32_t* list = words + init.words_begin;
  std::copy_n(list, sampling.num_stop_ids, mirror.stop_ids + row * kMaxStopIds);
  list += sampling.num_stop_ids;
  std::copy_n(list, sampling.num_logit_bias, mirror.bias_ids + row * kMaxLogitBias);
  list += sampling.num_logit_bias;
  std::memcpy(mirror.bias_values + row * kMaxLogitBias, list,
              static_cast<size_t>(sampling.num_logit_bias) * sizeof(float));
  list += sampling.num_logit_bias;
  std::copy_n(list, sampling.num_bad_words + sampling.num_bad_word_tokens, mirror.bad_words + row * kMaxBadWordEntries);
}

void apply_masks(const DeviceMirror& mirror, const uint8_t* packet) {
  const auto& header = *reinterpret_cast<const PacketHeader*>(packet);
  const auto* rows = section<int32_t>(packet, header.mask_rows_offset);
  const auto* bits = section<uint32_t>(packet, header.mask_bits_offset);
  for (int i = 0; i < header.num_masks; ++i) {
    const int64_t begin = int64_t{rows[i]} * mirror.mask_words;
    std::copy_n(bits + int64_t{i} * mirror.mask_words, mirror.mask_words, mirror.token_masks + begin);
  }
}

void fill_scores(const StepInputs& inputs, const uint8_t* packet) {
  const auto& header = *reinterpret_cast<const PacketHeader*>(packet);
  const auto* scores = section<ScoredToken>(packet, header.scores_offset);
  for (int i = 0; i < header.num_scored; ++i) {
    inputs.score_tokens[i] = scores[i].token_index;
    inputs.score_rows[i] = scores[i].row;
    inputs.score_targets[i] = scores[i].target;
  }
}

void apply_rewind(const DeviceMirror& mirror, const RowRewind& rewind) {
  mirror.num_computed[rewind.row] = rewind.num_computed;
  mirror.last_token[rewind.row] = rewind.last_token;
  mirror.stopped[rewind.row] = 0;
}

void apply_packet(const DeviceMirror& mirror, const uint8_t* packet, int max_live) {
  const auto& header = *reinterpret_cast<const PacketHeader*>(packet);
  const auto* words = section<int32_t>(packet, header.words_offset);
  const auto* inits = section<RowInit>(packet, header.inits_offset);
  for (int i = 0; i < header.num_inits; ++i) apply_init(mirror, inits[i], words);
  const auto* grants = section<BlockGrant>(packet, header.grants_offset);
  for (int i = 0; i < header.num_grants; ++i) {
    const BlockGrant& grant = grants[i];
    mirror.block_table[int64_t{grant.row} * mirror.max_blocks_per_row + grant.index] = grant.block;
  }
  const auto* rewinds = section<RowRewind>(packet, header.rewinds_offset);
  for (int i = 0; i < header.num_rewinds; ++i) apply_rewind(mirror, rewinds[i]);
  const auto* copies = section<StateCopy>(packet, header.copies_offset);
  for (int i = 0; i < header.num_copies; ++i) mirror.state_base[copies[i].dst_slot] = copies[i].position;
  apply_masks(mirror, packet);
  std::copy_n(section<StepRow>(packet, header.rows_offset), std::min(header.num_rows, max_live), mirror.live);
}

// Row i of the step; the dummy row where it is padding or the device has stopped it. Its tokens stay counted.
StepRow step_row(const DeviceMirror& mirror, int num_live, bool has_packet, int i) {
  if (i >= num_live) return {kDummyRow, 0, 1, -1, kDummySlot, 0};
  StepRow row = mirror.live[i];
  if (!has_packet) {
    row.num_tokens = 1;
    row.prompt_begin = -1;
    row.num_history = 0;
  }
  if (mirror.stopped[row.row] != 0) row.row = kDummyRow;
  return row;
}

void fill_dummy(const StepInputs& inputs, int i, int begin, int count) {
  inputs.rows[i] = kDummyRow;
  inputs.row_start[i] = 0;
  inputs.kv_lens[i] = 1;
  inputs.read_slots[i] = kDummySlot;
  inputs.write_slots[i] = kDummySlot;
  inputs.state_base[i] = 0;
  std::fill_n(inputs.token_ids + begin, count, 0);
  std::fill_n(inputs.positions + begin, count, 0);
}

void fill_row(const BeginStepParams& params, const StepRow& live, const int32_t* prompt_tokens, int i, int begin) {
  const DeviceMirror& mirror = params.mirror;
  const StepInputs& inputs = params.inputs;
  const bool is_decode = live.prompt_begin < 0;
  const int start = is_decode ? mirror.num_computed[live.row] : live.start;
  mirror.num_computed[live.row] = start;
  inputs.rows[i] = live.row;
  inputs.row_start[i] = start;
  inputs.kv_lens[i] = start + live.num_tokens;
  inputs.read_slots[i] = is_decode ? mirror.slot[live.row] : live.read_slot;
  inputs.write_slots[i] = mirror.slot[live.row];
  inputs.state_base[i] = is_decode ? mirror.state_base[mirror.slot[live.row]] : start;
  const int32_t* tokens = is_decode ? mirror.last_token + live.row : prompt_tokens + live.prompt_begin;
  int32_t* history = mirror.history + int64_t{live.row} * mirror.max_model_len;
  std::copy_n(tokens - live.num_history, live.num_history, history + start - live.num_history);
  for (int t = 0; t < live.num_tokens; ++t) {
    inputs.token_ids[begin + t] = tokens[t];
    inputs.positions[begin + t] = start + t;
    if (start + t < mirror.max_model_len) history[start + t] = tokens[t];
  }
}

// The packet's snapshots, as lists that the rows' entries point into; those of dummy rows are left out.
void fill_snapshots(const DeviceMirror& mirror, const StepInputs& inputs, const uint8_t* packet, int num_rows) {
  const auto& header = *reinterpret_cast<const PacketHeader*>(packet);
  const auto* next = section<StateSnapshot>(packet, header.snapshots_offset);
  const auto* end = next + header.num_snapshots;
  int num_kept = 0;
  for (int i = 0; i < num_rows; ++i) {
    inputs.snapshot_starts[i] = num_kept;
    for (; next < end && next->row_index == i; ++next) {
      if (inputs.rows[i] == kDummyRow) continue;
      mirror.state_base[next->slot] = next->position;
      inputs.snapshot_positions[num_kept] = next->position;
      inputs.snapshot_slots[num_kept++] = next->slot;
    }
  }
  inputs.snapshot_starts[num_rows] = num_kept;
}

}  // namespace

void begin_step(const BeginStepParams& params, Stream) {
  StepCounter* counter = params.mirror.counter;
  const int64_t next_step = counter == nullptr ? 0 : counter->step + 1;
  const auto* header = reinterpret_cast<const PacketHeader*>(params.packet);
  const bool has_packet = header != nullptr && (!params.is_replayed || header->step == next_step);

  // The mirror.
  int num_live = params.num_rows;
  if (has_packet) {
    num_live = std::min(header->num_rows, params.num_rows);
    apply_packet(params.mirror, params.packet, params.num_rows);
  } else if (counter != nullptr) {
    num_live = std::min(counter->num_live, params.num_rows);
  }
  if (counter != nullptr) {
    const int num_sampled = has_packet ? std::min(header->num_sampled, params.num_sampled) : num_live;
    *counter = {has_packet ? header->step : next_step, 0, num_live, num_sampled};
  }

  // The inputs, row by row.
  const StepInputs& inputs = params.inputs;
  const int32_t* prompt_tokens = has_packet ? section<int32_t>(params.packet, header->tokens_offset) : nullptr;
  inputs.query_start[0] = 0;
  for (int i = 0; i < params.num_rows; ++i) {
    const StepRow row = step_row(params.mirror, num_live, has_packet, i);
    const int begin = inputs.query_start[i];
    inputs.query_start[i + 1] = begin + row.num_tokens;
    std::fill_n(inputs.token_rows + begin, row.num_tokens, i);
    if (i < params.num_sampled) inputs.sample_tokens[i] = begin + row.num_tokens - 1;
    if (row.row == kDummyRow) {
      fill_dummy(inputs, i, begin, row.num_tokens);
    } else {
      fill_row(params, row, prompt_tokens, i, begin);
    }
  }
  if (has_packet) fill_scores(inputs, params.packet);
  if (has_packet && header->num_snapshots > 0) fill_snapshots(params.mirror, inputs, params.packet, params.num_rows);
}

}  // namespace headway::cpu
