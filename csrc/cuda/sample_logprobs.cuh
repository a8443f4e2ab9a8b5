// Log probability and rank of a row's token, and its alternatives, by the model's own logits: of what the scan left of
// its pieces. All threads of a block call all of it.
#pragma once

#include "cuda/sample_report.cuh"
#include "cuda/sample_scan.cuh"
#include "cuda/sample_select.cuh"

namespace headway::cuda {

inline constexpr int kMaxAlternatives = 256;  // looked through for those that are reported

struct RawPeak {
  LogNormaliser normaliser;
  float floor;  // all values of the row that reach it are among the pieces' alternatives
  int32_t best_id;
  bool is_complete;
};

struct LogprobMemory {
  RawPeak peak;
  int32_t num_found;
  uint32_t above[kFinishThreads / kWarpSize];
  Candidate found[kMaxAlternatives];
};

// By one warp, the pieces' masses in an order fixed by the vocabulary.
__device__ inline RawPeak find_raw_peak(const PieceSummary* pieces, int count) {
  const auto lane = static_cast<int>(threadIdx.x);
  Best best{-infinity(), INT32_MAX};
  float floor = -infinity();
  bool is_complete = true;
  for (int i = lane; i < count; i += kWarpSize) {
    best = BetterOf{}(best, {pieces[i].raw.best_value, pieces[i].raw.best_id});
    floor = fmaxf(floor, pieces[i].raw.floor);
    is_complete = is_complete && pieces[i].raw.num_alternatives >= 0;
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    best = BetterOf{}(best, shuffle_xor(best, offset));
    floor = fmaxf(floor, __shfl_xor_sync(kFullWarp, floor, offset));
  }
  double mass = 0.0;
  for (int i = lane; i < count; i += kWarpSize) {
    const float weight = best.value > -infinity() ? expf(pieces[i].raw.best_value - best.value) : 0.0f;
    mass += static_cast<double>(weight) * static_cast<double>(pieces[i].raw.mass);
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) mass += __shfl_xor_sync(kFullWarp, mass, offset);
  const LogNormaliser normaliser{best.value, logf(static_cast<float>(mass / kMassUnit))};
  return {normaliser, floor, best.id, __all_sync(kFullWarp, is_complete) != 0};
}

// False: the scan did not leave enough to name the alternatives.
__device__ inline bool gather_logprobs(const ScannedRow& row, int count, LogprobMemory& memory) {
  const auto thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // what the memory held before has been read
  if (thread < kWarpSize) {
    const RawPeak peak = find_raw_peak(row.pieces, count);
    if (thread == 0) {
      memory.peak = peak;
      memory.num_found = 0;
    }
  }
  __syncthreads();
  if (memory.peak.normaliser.largest == -infinity() || row.num_alternatives == 0) return true;
  if (!memory.peak.is_complete) return false;
  for (int piece = thread / kWarpSize; piece < count; piece += kFinishThreads / kWarpSize) {
    const RawSummary& raw = row.pieces[piece].raw;
    for (int i = thread % kWarpSize; i < raw.num_alternatives; i += kWarpSize) {
      const Candidate candidate = raw.alternatives[i];
      if (candidate.logit < memory.peak.floor) continue;
      const int place = atomicAdd(&memory.num_found, 1);
      if (place < kMaxAlternatives) memory.found[place] = candidate;
    }
  }
  __syncthreads();
  return memory.num_found >= row.num_alternatives && memory.num_found <= kMaxAlternatives;
}

// 1 + the number of logits above the token's.
__device__ inline int rank_in_row(const SampleParams& params, const ScannedRow& row, float value,
                                  LogprobMemory& memory) {
  const float* logits = params.logits + row.index * params.logits_stride;
  uint32_t above = 0;
  if (row.num_alternatives > 0 && value >= memory.peak.floor) {
    for (int i = static_cast<int>(threadIdx.x); i < memory.num_found; i += kFinishThreads) {
      above += memory.found[i].logit > value ? 1 : 0;
    }
  } else {
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x); i < params.vocab_size; i += kFinishThreads) {
      above += logits[i] > value ? 1 : 0;
    }
  }
  above = __reduce_add_sync(kFullWarp, above);
  if (threadIdx.x % kWarpSize == 0) memory.above[threadIdx.x / kWarpSize] = above;
  __syncthreads();
  int rank = 1;
  for (const uint32_t of_warp : memory.above) rank += static_cast<int>(of_warp);
  return rank;
}

// After gather_logprobs, and once the row's alternatives have been cleared.
__device__ inline void report_logprobs(const SampleParams& params, const ScannedRow& row, int token,
                                       LogprobMemory& memory, ResultRow& result) {
  const RawPeak& peak = memory.peak;
  const float value = params.logits[row.index * params.logits_stride + token];
  const bool is_empty = peak.normaliser.largest == -infinity();
  result.logprob = is_empty ? -infinity() : peak.normaliser.logprob(value);
  result.rank = token == peak.best_id ? 1 : rank_in_row(params, row, value, memory);
  if (is_empty || row.num_alternatives == 0) return;
  const auto place = static_cast<int>(threadIdx.x);
  if (place >= memory.num_found) return;
  const Candidate mine = memory.found[place];
  int rank = 0;
  for (int i = 0; i < memory.num_found; ++i) {
    const Candidate& other = memory.found[i];
    rank += other.logit > mine.logit || (other.logit == mine.logit && other.id < mine.id) ? 1 : 0;
  }
  if (rank >= row.num_alternatives) return;
  const int64_t out = static_cast<int64_t>(row.index) * params.max_logprobs + rank;
  params.top_ids[out] = mine.id;
  params.top_logprobs[out] = peak.normaliser.logprob(mine.logit);
}

}  // namespace headway::cuda
