// Order statistics over one row of logits, spread over a team of blocks: the k-th largest value, or the value at which
// the mass of all larger ones reaches a target. One histogram over bins as fine as logits are dense finds the bin, and
// the few values in it are compared with each other. Where they are not few (ties, mostly) it is radix selection: three
// histograms over 11, 11 and 10 bits of the value's ordered bits. All sums are of integers, so their order cannot
// matter.
#pragma once

#include "cuda/common/cluster.cuh"
#include "cuda/common/math.cuh"

namespace headway::cuda {

inline constexpr int kSampleThreads = 512;
inline constexpr int kSelectBins = 2048;
inline constexpr int kBlockCandidates = 256;  // values of one bin that a block may hand in
inline constexpr float kBinsPerUnit = 64.0f;  // of a logit

// Probabilities are in units of 2^-31 of the largest one.
inline constexpr float kMassUnit = 2147483648.0f;

__device__ __forceinline__ uint32_t mass_of(float probability) {
  return __float2uint_rn(probability * kMassUnit);
}

// Unsigned order of the bits = order of the values. -0 is made 0 first: they are equal.
__device__ __forceinline__ uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of_bits(uint32_t ordered) {
  return __uint_as_float((ordered & 0x80000000u) != 0 ? ordered & 0x7fffffffu : ~ordered);
}

// 64-bit sums per bin, kept as two words: 64-bit atomics on shared memory are emulated.
struct SelectHistogram {
  uint32_t low[kSelectBins];
  uint32_t high[kSelectBins];
};

// This block's part of a row.
struct Slice {
  float* values;
  int begin;  // vocabulary id of values[0]
  int size;
};

struct Selection {
  uint32_t bits;  // ordered bits of the threshold
  uint64_t remaining;  // count or mass still wanted among the values equal to the threshold, > 0
  uint64_t tied;  // count or mass of all values equal to it
};

namespace detail {

struct Crossing {
  uint32_t bin;  // kSelectBins: not in this block's bins
  uint32_t reserved;
  uint64_t above;
};

// What one value adds to its bin; values without mass never matter.
template <bool kByMass>
__device__ __forceinline__ uint32_t weight_of(float value) {
  if constexpr (kByMass) return mass_of(value);
  return 1u;
}

// Higher values in higher bins, `top` in the last: logits in steps of 1 / 64, probabilities 64 to a factor of two.
template <bool kByMass>
__device__ __forceinline__ uint32_t fine_bin(float value, float top) {
  const uint32_t below =
      kByMass ? (__float_as_uint(1.0f) - __float_as_uint(value)) >> 17 : __float2uint_rz((top - value) * kBinsPerUnit);
  return kSelectBins - 1 - min(below, static_cast<uint32_t>(kSelectBins - 1));
}

__device__ inline void clear_histogram(SelectHistogram& bins) {
  for (int i = static_cast<int>(threadIdx.x); i < kSelectBins; i += kSampleThreads) {
    bins.low[i] = 0;
    bins.high[i] = 0;
  }
  __syncthreads();
}

template <bool kByMass>
__device__ __forceinline__ void add_to_bin(SelectHistogram& bins, uint32_t bin, uint32_t weight) {
  const uint32_t old = atomicAdd(&bins.low[bin], weight);
  if (kByMass && old + weight < old) atomicAdd(&bins.high[bin], 1u);
}

template <bool kByMass>
__device__ void fill_fine_histogram(const Slice& slice, float top, SelectHistogram& bins) {
  clear_histogram(bins);
  for (int i = static_cast<int>(threadIdx.x); i < slice.size; i += kSampleThreads) {
    const uint32_t weight = weight_of<kByMass>(slice.values[i]);
    if (weight != 0) add_to_bin<kByMass>(bins, fine_bin<kByMass>(slice.values[i], top), weight);
  }
}

template <bool kByMass>
__device__ void fill_histogram(const Slice& slice, uint32_t prefix, int shift, int num_bits, SelectHistogram& bins) {
  const int thread = static_cast<int>(threadIdx.x);
  clear_histogram(bins);
  const uint32_t mask = (1u << num_bits) - 1;
  for (int i = thread; i < slice.size; i += kSampleThreads) {
    const uint32_t bits = ordered_bits(slice.values[i]);
    const uint32_t weight = weight_of<kByMass>(slice.values[i]);
    const bool has_prefix = ((static_cast<uint64_t>(bits) ^ prefix) >> (shift + num_bits)) == 0;
    if (!has_prefix || weight == 0) continue;
    add_to_bin<kByMass>(bins, bits >> shift & mask, weight);
  }
}

__device__ __forceinline__ uint64_t bin_of_team(const Team& team, const SelectHistogram& bins, int bin) {
  uint64_t sum = 0;
  for (int rank = 0; rank < team.size(); ++rank) {
    const SelectHistogram* peer = team.peer(&bins, rank);
    sum += peer->low[bin] + (static_cast<uint64_t>(peer->high[bin]) << 32);
  }
  return sum;
}

// Exclusive prefix sum over the block's threads.
__device__ __forceinline__ uint64_t block_exclusive_sum(uint64_t value, uint64_t* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  uint64_t inclusive = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint64_t other = __shfl_up_sync(kFullWarp, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  __syncthreads();
  if (lane == kWarpSize - 1) scratch[warp] = inclusive;
  __syncthreads();
  uint64_t before = 0;
  for (int i = 0; i < warp; ++i) before += scratch[i];
  return before + inclusive - value;
}

}  // namespace detail

// Shared memory of a selection, per block.
struct SelectMemory {
  SelectHistogram bins;
  uint64_t scratch[kSampleThreads / kWarpSize];
  detail::Crossing crossing;
  uint64_t at_crossing;
  uint32_t num_candidates;
  float candidates[kBlockCandidates];
};
static_assert(kMaxTeamBlocks * kBlockCandidates * sizeof(float) <= sizeof(SelectHistogram));

namespace detail {

// Finds the bin, from the highest down, at which the running sum reaches `wanted`. A block looks through its share of
// the bins; the one that finds it tells the team.
__device__ inline Selection find_crossing(Team& team, SelectMemory& memory, int num_bins, uint64_t wanted) {
  team.sync();  // histograms are complete
  const int share = num_bins / team.size();
  const int per_thread = (share + kSampleThreads - 1) / kSampleThreads;
  const int top = (team.rank() + 1) * share - 1;  // of this block's bins
  const int first = static_cast<int>(threadIdx.x) * per_thread;
  uint64_t mine = 0;
  for (int i = first; i < min(first + per_thread, share); ++i) mine += bin_of_team(team, memory.bins, top - i);
  uint64_t above = block_exclusive_sum(mine, memory.scratch);
  const uint64_t block_sum = team.combine_block(mine, [](uint64_t a, uint64_t b) { return a + b; });
  team.publish(block_sum);
  for (int rank = team.rank() + 1; rank < team.size(); ++rank) above += team.published_value<uint64_t>(rank);

  if (threadIdx.x == 0) memory.crossing.bin = kSelectBins;
  __syncthreads();
  for (int i = first; i < min(first + per_thread, share); ++i) {
    const uint64_t at = bin_of_team(team, memory.bins, top - i);
    if (above < wanted && wanted <= above + at) {
      memory.crossing = {static_cast<uint32_t>(top - i), 0, above};
      memory.at_crossing = at;
    }
    above += at;
  }
  team.sync();
  Selection found{0, wanted, 0};
  for (int rank = 0; rank < team.size(); ++rank) {
    const Crossing crossing = *team.peer(&memory.crossing, rank);
    if (crossing.bin == kSelectBins) continue;
    found = {crossing.bin, wanted - crossing.above, *team.peer(&memory.at_crossing, rank)};
  }
  team.sync();  // everyone has read: bins and crossing may change
  return found;
}

// Selects among the values of one bin, all on chip; false, for the whole team, if they are too many.
template <bool kByMass>
__device__ bool select_in_bin(Team& team, SelectMemory& memory, const Slice& slice, float top, const Selection& bin,
                              Selection& found) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) memory.num_candidates = 0;
  __syncthreads();
  for (int i = thread; i < slice.size; i += kSampleThreads) {
    const float value = slice.values[i];
    if (weight_of<kByMass>(value) == 0 || fine_bin<kByMass>(value, top) != bin.bits) continue;
    const uint32_t place = atomicAdd(&memory.num_candidates, 1u);
    if (place < kBlockCandidates) memory.candidates[place] = value;
  }
  team.sync();
  auto* all = reinterpret_cast<float*>(&memory.bins);
  uint32_t count = 0;
  bool fits = true;
  for (int rank = 0; rank < team.size(); ++rank) {
    const uint32_t of_rank = *team.peer(&memory.num_candidates, rank);
    fits = fits && of_rank <= kBlockCandidates;
    if (!fits) break;
    const float* values = team.peer(&memory.candidates[0], rank);
    for (uint32_t i = threadIdx.x; i < of_rank; i += kSampleThreads) all[count + i] = values[i];
    count += of_rank;
  }
  team.sync();  // everyone has read
  if (!fits) return false;
  for (uint32_t i = threadIdx.x; i < count; i += kSampleThreads) {
    uint64_t above = 0;
    uint64_t tied = 0;
    for (uint32_t j = 0; j < count; ++j) {
      const uint32_t weight = weight_of<kByMass>(all[j]);
      above += all[j] > all[i] ? weight : 0;
      tied += all[j] == all[i] ? weight : 0;
    }
    if (above < bin.remaining && bin.remaining <= above + tied) {
      memory.crossing = {ordered_bits(all[i]), 0, above};  // the same whoever of the tied writes it
      memory.at_crossing = tied;
    }
  }
  __syncthreads();
  found = {memory.crossing.bin, bin.remaining - memory.crossing.above, memory.at_crossing};
  return true;
}

}  // namespace detail

// The largest value v of the row such that the values >= v count at least `wanted`, or weigh as much. All threads of
// the team call it; 0 < wanted <= the row's count or mass. top: the row's largest logit; by mass values are
// probabilities of at most 1, and it is not used.
template <bool kByMass>
__device__ Selection select_threshold(Team& team, SelectMemory& memory, const Slice& slice, uint64_t wanted,
                                      float top) {
  detail::fill_fine_histogram<kByMass>(slice, top, memory.bins);
  const Selection bin = detail::find_crossing(team, memory, kSelectBins, wanted);
  Selection selected{};
  if (detail::select_in_bin<kByMass>(team, memory, slice, top, bin, selected)) return selected;
  constexpr int kShifts[] = {21, 10, 0};
  constexpr int kBits[] = {11, 11, 10};
  Selection found{0, wanted, 0};
#pragma unroll
  for (int pass = 0; pass < 3; ++pass) {
    detail::fill_histogram<kByMass>(slice, found.bits, kShifts[pass], kBits[pass], memory.bins);
    const Selection digit = detail::find_crossing(team, memory, 1 << kBits[pass], found.remaining);
    found = {found.bits | digit.bits << kShifts[pass], digit.remaining, digit.tied};
  }
  return found;
}

// Drops (to `dropped`) the values equal to the threshold beyond the first `num_kept` of them in vocabulary order.
__device__ inline void drop_late_ties(Team& team, const Slice& slice, uint32_t bits, uint64_t num_kept, float dropped) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  constexpr int kWarps = kSampleThreads / kWarpSize;
  const int segment = (slice.size + kSampleThreads - 1) / kSampleThreads * kWarpSize;
  const int begin = min(warp * segment, slice.size);
  const int end = min(begin + segment, slice.size);

  uint32_t count = 0;
  for (int i = begin + lane; i < end; i += kWarpSize) count += ordered_bits(slice.values[i]) == bits ? 1 : 0;
  const auto sum = [](uint32_t a, uint32_t b) { return a + b; };
  team.publish(team.combine_block(count, sum));
  uint64_t before = 0;
  for (int rank = 0; rank < team.rank(); ++rank) before += team.published_value<uint32_t>(rank);
  for (int i = 0; i < min(warp, kWarps); ++i) before += team.warp_value<uint32_t>(i);

  for (int base = begin; base < end; base += kWarpSize) {
    const int i = base + lane;
    const bool is_tied = i < end && ordered_bits(slice.values[i]) == bits;
    const uint32_t ties = __ballot_sync(kFullWarp, is_tied);
    if (is_tied && before + __popc(ties & ((1u << lane) - 1)) >= num_kept) slice.values[i] = dropped;
    before += __popc(ties);
  }
  __syncthreads();
}

}  // namespace headway::cuda
