// What the scan leaves of one piece, whose logits a block holds in registers.
#pragma once

#include "cuda/sample_mass.cuh"
#include "cuda/sample_scan.cuh"
#include "cuda/sample_select.cuh"

namespace headway::cuda {

inline constexpr int kPieceCount = kPieceLogits / kScanThreads;
using PieceLogits = ThreadLogits<kScanThreads, kPieceCount>;
inline constexpr int kScanWarps = kScanThreads / kWarpSize;
inline constexpr int kFloorSteps = 24;
inline constexpr int kFloorSlack = 8;

struct PieceMemory {
  uint32_t best[2][kScanWarps];  // ordered bits; two, so that no exchange waits for the one before
  int32_t best_id[2];
  uint64_t mass[kScanWarps];
  uint64_t raw_mass[kScanWarps];
  int32_t num_candidates;
  int32_t num_alternatives;
  uint32_t low[kMassBins];  // 64-bit sums in two words: 64-bit atomics on shared memory are emulated
  uint32_t high[kMassBins];
};

__device__ inline float largest_of_thread(const PieceLogits& logits) {
  float largest = logits.values[0];
#pragma unroll
  for (int i = 1; i < kPieceCount; ++i) largest = max_or_nan(largest, logits.values[i]);
  return largest;
}

// The largest logit of the piece, or NaN, and its lowest id. Only threads that have that logit look for its id: in all
// of them the search costs as much as the maximum.
__device__ inline Candidate best_of_block(const PieceLogits& logits, int begin, int turn, PieceMemory& memory) {
  const float mine = largest_of_thread(logits);
  const uint32_t bits = ordered_bits(mine);  // NaN is that with the largest
  const uint32_t of_warp = __reduce_max_sync(kFullWarp, bits);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (lane == 0) memory.best[turn][threadIdx.x / kWarpSize] = of_warp;
  if (threadIdx.x == 0) {
    memory.best_id[turn] = INT32_MAX;
    memory.num_candidates = memory.num_alternatives = 0;
  }
  __syncthreads();
  const uint32_t best = __reduce_max_sync(kFullWarp, memory.best[turn][lane % kScanWarps]);
  if (bits == best) {
    int id = INT32_MAX;
#pragma unroll
    for (int i = kPieceCount - 1; i >= 0; --i) id = logits.values[i] == mine ? begin + logits.place(i) : id;
    atomicMin(&memory.best_id[turn], id);
  }
  __syncthreads();
  return {value_of_bits(best), memory.best_id[turn]};
}

// A value that at least `count` threads' largest reach, and few more: so many of the piece's values reach it as well.
__device__ inline float find_floor(float mine, float largest, int count) {
  const uint32_t bits = ordered_bits(mine);
  uint32_t low = 0;  // reached by all
  uint32_t high = ordered_bits(largest);
  for (int step = 0; step < kFloorSteps && low < high; ++step) {
    const uint32_t middle = low + (high - low + 1) / 2;
    const int reached = __syncthreads_count(bits >= middle);
    if (reached >= count) {
      low = middle;
      if (reached <= count + kFloorSlack) break;
    } else {
      high = middle - 1;
    }
  }
  constexpr uint32_t kLeastFinite = 0x00800000u;  // ordered bits of -FLT_MAX
  return value_of_bits(max(low, kLeastFinite));
}

// Every value that may be among the row's top_k.
__device__ inline void leave_candidates(const PieceLogits& logits, float floor, int begin, PieceMemory& memory,
                                        PieceSummary& summary) {
#pragma unroll
  for (int i = 0; i < kPieceCount; ++i) {
    if (!(logits.values[i] >= floor)) continue;
    const int place = atomicAdd(&memory.num_candidates, 1);
    if (place < kPieceCandidates) summary.candidates[place] = {logits.values[i], begin + logits.place(i)};
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  summary.num_candidates = memory.num_candidates <= kPieceCandidates ? memory.num_candidates : -1;
  summary.floor = floor;
}

// Once between two barriers for the same scratch.
__device__ inline uint64_t sum_of_block(uint64_t mine, uint64_t (&of_warps)[kScanWarps]) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) mine += __shfl_xor_sync(kFullWarp, mine, offset);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  uint64_t sum = 0;
  for (const uint64_t of_warp : of_warps) sum += of_warp;
  return sum;
}

// By the raw logits, before the row's token is thought of. best: of the piece.
__device__ inline void leave_raw(const PieceLogits& logits, const Candidate& best, int num_alternatives, int begin,
                                 PieceMemory& memory, RawSummary& summary) {
  const bool is_empty = best.logit == -infinity();
  float floor = infinity();
  if (num_alternatives > 0 && !is_empty) {
    floor = find_floor(largest_of_thread(logits), best.logit, num_alternatives);
#pragma unroll
    for (int i = 0; i < kPieceCount; ++i) {
      if (!(logits.values[i] >= floor)) continue;
      const int place = atomicAdd(&memory.num_alternatives, 1);
      if (place < kPieceAlternatives) summary.alternatives[place] = {logits.values[i], begin + logits.place(i)};
    }
  }
  uint64_t mass = 0;
  if (!is_empty) {
#pragma unroll
    for (int i = 0; i < kPieceCount; ++i) mass += mass_of(expf(logits.values[i] - best.logit));
  }
  mass = sum_of_block(mass, memory.raw_mass);
  if (threadIdx.x != 0) return;
  const int count = memory.num_alternatives;
  summary.best_value = best.logit;
  summary.best_id = best.id;
  summary.floor = is_empty ? -infinity() : floor;
  summary.num_alternatives = count <= kPieceAlternatives ? count : -1;
  summary.mass = mass;
}

__device__ inline void add_to_bin(PieceMemory& memory, float weight) {
  const uint32_t units = units_of(weight);
  if (units == 0) return;
  const int bin = mass_bin(weight);
  const uint32_t old = atomicAdd(&memory.low[bin], units);
  if (old + units < old) atomicAdd(&memory.high[bin], 1u);
}

__device__ inline void leave_mass(const PieceLogits& logits, float largest, const RowSampling& sampling,
                                  PieceMemory& memory, PieceSummary& summary) {
  const float factor = mass_scale(sampling.temperature);
  const float power = largest * factor;
  const bool is_far = !(power > -kMaxPower);  // also -inf
  if (is_far || !(power < kMaxPower) || !(factor < kMaxFactor)) {
    if (threadIdx.x != 0) return;
    summary.exponent = -kMaxPower;
    summary.mass = 0;
    summary.num_candidates = is_far && factor < kMaxFactor ? 0 : -1;
    return;
  }
  const float exponent = mass_exponent(largest, factor);
  const MassScale scale{factor, 31.0f - exponent};
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t mass = 0;
  if (is_cut(sampling)) {
    for (int i = thread; i < kMassBins; i += kScanThreads) memory.low[i] = memory.high[i] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPieceCount; ++i) add_to_bin(memory, scale.weight(logits.values[i]));
    __syncthreads();
    for (int i = thread; i < kMassBins; i += kScanThreads) {
      summary.bins[i] = memory.low[i] | static_cast<uint64_t>(memory.high[i]) << 32;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPieceCount; ++i) mass += units_of(scale.weight(logits.values[i]));
    mass = sum_of_block(mass, memory.mass);
  }
  if (thread != 0) return;
  summary.exponent = exponent;
  summary.mass = mass;
  summary.num_candidates = 0;
}

__device__ inline void summarise_piece(const PieceLogits& logits, const Candidate& best, const ScannedRow& row,
                                       int begin, PieceMemory& memory, PieceSummary& summary) {
  if (threadIdx.x == 0) {
    summary.best_value = best.logit;
    summary.best_id = best.id;
    summary.floor = -infinity();  // below, each kind writes what it needs of the rest; the row's end reads all
    summary.num_candidates = 0;
  }
  if (!(best.logit < infinity()) || row.kind == ScanKind::kGreedy) return;
  if (row.kind == ScanKind::kMass) return leave_mass(logits, best.logit, row.sampling, memory, summary);
  const float mine = largest_of_thread(logits);
  leave_candidates(logits, find_floor(mine, best.logit, row.sampling.top_k), begin, memory, summary);
}

}  // namespace headway::cuda
