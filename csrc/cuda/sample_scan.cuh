// Rows whose logits need one look. Scan: a block reads one piece of one row into registers, all loads at once, edits it
// where the request asks for it, and leaves of it what can matter: of greedy rows the largest, of rows that sample
// among a few their candidates, of others the mass, with a histogram of it where top_p or min_p cut. Finish: a block a
// row makes the token of that. What does not fit (ties beyond all measure, extreme temperatures) goes to the row's team
// (sample_team.cuh), as do rows that want log probabilities of what is sampled from.
#pragma once

#include "core/step_layout.h"
#include "cuda/common/math.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/sample_edit_piece.cuh"
#include "params/step.h"

namespace headway::cuda {

inline constexpr int kScanThreads = 256;
inline constexpr int kPieceLogits = kEditIds;
inline constexpr int kFinishThreads = 1024;
inline constexpr int kMaxScannedRows = 65535;  // one grid
inline constexpr int kPieceCandidates = 128;
inline constexpr int kPieceAlternatives = 64;
inline constexpr int kPieceEdits = 512;
inline constexpr int kMaxScannedAlternatives = 32;  // so that ties rarely exceed kPieceAlternatives
inline constexpr int kMaxPieces = 64;  // of a row; a larger vocabulary is left to the teams
inline constexpr int kMaxScannedTopK = 64;  // so that ties rarely exceed kPieceCandidates
inline constexpr int kMassBins = 512;

struct Candidate {
  float logit;
  int32_t id;
};

// What a piece adds to log probabilities, by its raw logits. Of rows that want them only.
struct RawSummary {
  float best_value;
  int32_t best_id;
  float floor;  // of the alternatives: at least so many of the piece's values as are wanted are no smaller
  int32_t num_alternatives;  // -1: they do not fit
  uint64_t mass;  // of exp(logit - best_value), in units of kMassUnit
  Candidate alternatives[kPieceAlternatives];
};

// The piece's edited logits; not those that only the token mask drops. Of edited rows only.
struct EditSummary {
  int32_t num_edits;  // -1: they do not fit
  uint32_t is_edited[kPieceLogits / 32];  // bits
  Candidate edits[kPieceEdits];
};

struct alignas(16) PieceSummary {
  float best_value;  // NaN: NaN or +inf among the raw logits; +inf: once they were edited
  int32_t best_id;  // greedy rows only
  int32_t num_candidates;  // -1: the piece does not fit the scan
  float floor;  // of the candidates: at least top_k of the piece's values are no smaller, if it has as many
  uint64_t mass;  // in units of 2^(exponent - 31)
  float exponent;
  int32_t reserved;
  RawSummary raw;
  EditSummary edits;
  union {
    Candidate candidates[kPieceCandidates];
    uint64_t bins[kMassBins];
  };
};

__host__ __device__ constexpr int num_pieces(int vocab_size) {
  return (vocab_size + kPieceLogits - 1) / kPieceLogits;
}

// The scan's memory: whether each row has its token, then the pieces' summaries, row by row.
struct ScanSpace {
  int32_t* is_done;  // [num_sampled]
  PieceSummary* pieces;  // [num_sampled, num_pieces]

  __host__ __device__ static int64_t flag_bytes(int num_sampled) { return (num_sampled * int64_t{4} + 15) / 16 * 16; }
  __host__ __device__ explicit ScanSpace(const SampleParams& params)
      : is_done(static_cast<int32_t*>(params.scan)),
        pieces(reinterpret_cast<PieceSummary*>(static_cast<unsigned char*>(params.scan) +
                                               flag_bytes(params.num_sampled))) {}
};

enum class ScanKind { kNone, kGreedy, kFew, kMass };

__device__ __forceinline__ ScanKind scan_kind(const RowSampling& sampling, int vocab_size) {
  const bool is_processed = sampling.num_logprobs >= 0 && (sampling.flags & kProcessedLogprobs) != 0;
  if (is_processed || sampling.num_logprobs > kMaxScannedAlternatives) return ScanKind::kNone;
  if (sampling.temperature == 0.0f) return ScanKind::kGreedy;
  if (sampling.top_k <= 0 || sampling.top_k >= vocab_size) return ScanKind::kMass;
  return sampling.top_k <= kMaxScannedTopK ? ScanKind::kFew : ScanKind::kNone;
}

// A row as the scan and the row's end see it.
struct ScannedRow {
  int index;  // of the row in the step
  int row;
  int kv_len;
  const RowSampling& sampling;
  ScanKind kind;
  bool is_edited;
  bool has_logprobs;
  bool is_plain;  // takes the largest logit as it stands and reports nothing: never left to a team
  int num_alternatives;
  PieceSummary* pieces;

  __device__ ScannedRow(const SampleParams& params, int row_index)
      : index(row_index),
        row(params.rows[row_index]),
        kv_len(params.kv_lens[row_index]),
        sampling(params.mirror.sampling[row]),
        kind(row == kDummyRow ? ScanKind::kNone : scan_kind(sampling, params.vocab_size)),
        is_edited(kind != ScanKind::kNone && ::headway::cuda::is_edited(sampling, kv_len)),
        has_logprobs(kind != ScanKind::kNone && sampling.num_logprobs >= 0),
        is_plain(kind == ScanKind::kGreedy && !is_edited && !has_logprobs),
        num_alternatives(min(min(sampling.num_logprobs, params.max_logprobs), params.vocab_size)),
        pieces(ScanSpace(params).pieces + static_cast<int64_t>(row_index) * num_pieces(params.vocab_size)) {}
};

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// A thread's part of kThreads * kCount logits; -inf beyond their end.
template <int kThreads, int kCount>
struct ThreadLogits {
  float values[kCount];
  bool is_quad;

  __device__ int place(int i) const {
    const int thread = static_cast<int>(threadIdx.x);
    return is_quad ? (i / 4 * kThreads + thread) * 4 + i % 4 : i * kThreads + thread;
  }

  __device__ void load(const float* source, int size) {
    const int thread = static_cast<int>(threadIdx.x);
    const float none = -infinity();
    is_quad = reinterpret_cast<uintptr_t>(source) % sizeof(float4) == 0 && size % 4 == 0;
    if (is_quad) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const int place = (i / 4 * kThreads + thread) * 4;
        values[i] = values[i + 1] = values[i + 2] = values[i + 3] = none;
        if (place >= size) continue;
        // volatile: before all that does not need it
        asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(values[i]), "=f"(values[i + 1]), "=f"(values[i + 2]), "=f"(values[i + 3])
                     : "l"(source + place));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[i] = i * kThreads + thread < size ? source[i * kThreads + thread] : none;
      }
    }
  }
};

void launch_sample_scan(const SampleParams& params, cudaStream_t stream);
// After it: makes the tokens of the rows it can; ScanSpace::is_done says which.
void launch_sample_finish(const SampleParams& params, cudaStream_t stream);

}  // namespace headway::cuda
