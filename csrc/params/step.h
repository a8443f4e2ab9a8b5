#pragma once

#include "core/step_layout.h"
#include "params/common.h"

namespace headway {

// First kernel of a step: applies the packet (if any) to the mirror and derives the layers' inputs. The counts are the
// host's and equal those of the packet, or of the last packet when there is none.
struct BeginStepParams {
  const uint8_t* packet;      // null: nothing new, every live row decodes again
  int32_t num_rows;           // R
  int32_t num_decode_rows;
  int32_t num_sampled;
  int32_t num_tokens;         // T
  DeviceMirror mirror;
  StepInputs inputs;
  // For a captured graph: packet is one fixed address, and what lies there is news only when its step is the counter's
  // next. num_rows may exceed the live rows: the rest are dummy rows of one token.
  bool is_replayed = false;
};

// Sampler: logits to one token a row. Probabilities are those of the biased, masked, penalised, temperature-scaled
// logits. With targets it samples nothing: the given tokens' log probabilities, of the model's own logits, are reported
// instead, with RowSampling::num_prompt_logprobs alternatives.
struct SampleParams {
  int32_t num_sampled;        // Rs
  int32_t vocab_size;         // V
  int32_t max_logprobs;       // K: columns of top_ids and top_logprobs
  const float* logits;        // [Rs, V] rows logits_stride apart; not modified
  int64_t logits_stride;
  const int32_t* rows;        // [Rs] row ids: the step's first Rs rows
  const int32_t* kv_lens;     // [Rs] the position the sampled token will have; unused with targets
  const int32_t* targets;     // [Rs] tokens to score; null: sample
  DeviceMirror mirror;
  ResultRow* results;         // [Rs] device memory
  int32_t* top_ids;           // [Rs, K] device memory, -1 where unused
  float* top_logprobs;        // [Rs, K] device memory
  float* scratch = nullptr;   // sample_scratch_bytes of device memory: [Rs, V] where a row does not fit on chip
  void* scan = nullptr;       // sample_scan_bytes of device memory, 16-byte aligned; unused on a CPU
};

// Last kernel of a step: advances the mirror by what was sampled, and publishes the results to the ring entry.
struct FinishStepParams {
  int64_t step;
  int32_t num_rows;           // R
  int32_t num_decode_rows;    // the first rows
  int32_t num_sampled;        // Rs
  int32_t num_scored;         // results after those of the sampled rows
  int32_t max_logprobs;       // K
  DeviceMirror mirror;
  StepInputs inputs;
  const ResultRow* results;   // [Rs + num_scored]
  const int32_t* top_ids;     // [Rs + num_scored, K]
  const float* top_logprobs;  // [Rs + num_scored, K]
  uint8_t* ring_entry;        // host memory the device can write: ResultHeader and what follows it
  int32_t ring_max_results;   // that the entry has room for
  // For a captured graph: > 0 makes ring_entry the first of that many entries, ring_entry_bytes apart; the step is then
  // mirror.counter's, and so is the entry, step % ring_num_entries.
  int32_t ring_num_entries = 0;
  int64_t ring_entry_bytes = 0;
};

}  // namespace headway
