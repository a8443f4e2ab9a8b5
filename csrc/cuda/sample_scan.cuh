// Rows that need little of their logits: greedy ones, and those that sample among a few of the largest. A scan over
// pieces of all rows at once, by blocks that wait for nobody, leaves what can matter of each piece; the sampler picks
// the token from that. Other rows are read by their team (sample.cu).
#pragma once

#include "core/step_layout.h"
#include "cuda/common/reduce.cuh"
#include "params/step.h"

namespace headway::cuda {

inline constexpr int kPieceLogits = 8192;
inline constexpr int kPieceCandidates = 128;
inline constexpr int kMaxScannedTopK = 64;  // so that ties and the bins' width rarely exceed kPieceCandidates

struct Candidate {
  float value;  // logit / temperature
  int32_t id;
};

struct alignas(16) PieceSummary {
  float best_value;  // raw logit
  int32_t best_id;
  int32_t is_bad;  // NaN or +inf somewhere
  int32_t num_candidates;  // -1: more than fit
  Candidate candidates[kPieceCandidates];
};

__host__ __device__ constexpr int num_pieces(int vocab_size) {
  return (vocab_size + kPieceLogits - 1) / kPieceLogits;
}

// Whether a row of unchanged logits is left to the scan.
__device__ __forceinline__ bool is_scanned(const RowSampling& sampling, int vocab_size) {
  if (sampling.num_logprobs >= 0) return false;
  const bool has_few = sampling.top_k > 0 && sampling.top_k <= kMaxScannedTopK && sampling.top_k < vocab_size;
  return sampling.temperature == 0.0f || has_few;
}

// Fills [num_sampled, num_pieces] summaries in params.scratch for the scanned rows.
void launch_sample_scan(const SampleParams& params, cudaStream_t stream);

}  // namespace headway::cuda
