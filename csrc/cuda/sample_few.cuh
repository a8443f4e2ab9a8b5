// The token of a row that sample_scan.cuh's scan has read: from the best of its pieces, or drawn among the few
// candidates they left. One block's work; the same arithmetic as for other rows, so the same token.
#pragma once

#include "cuda/common/philox.cuh"
#include "cuda/sample_scan.cuh"
#include "cuda/sample_select.cuh"

namespace headway::cuda {

struct ScannedRow {
  float best_value;  // raw logit
  int32_t best_id;
  bool is_bad;
  bool is_complete;  // no piece has more candidates than fit, and quotients are finite
};

// Every thread of the block calls it and gets the same.
__device__ inline ScannedRow summarise(const PieceSummary* pieces, int count, float temperature) {
  __shared__ ScannedRow row;
  if (threadIdx.x < kWarpSize) {
    float value = -__int_as_float(0x7f800000);
    int id = INT32_MAX;
    bool is_bad = false;
    bool is_complete = true;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kWarpSize) {
      const int4 head = *reinterpret_cast<const int4*>(pieces + i);
      const float best = __int_as_float(head.x);
      if (best > value || (best == value && head.y < id)) {
        value = best;
        id = head.y;
      }
      is_bad = is_bad || head.z != 0;
      is_complete = is_complete && head.w >= 0;
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(kFullWarp, value, offset);
      const int other_id = __shfl_xor_sync(kFullWarp, id, offset);
      if (other > value || (other == value && other_id < id)) {
        value = other;
        id = other_id;
      }
    }
    is_bad = __any_sync(kFullWarp, is_bad) != 0;
    is_complete = __all_sync(kFullWarp, is_complete) != 0;
    if (temperature != 0.0f) is_complete = is_complete && value / temperature < __int_as_float(0x7f800000);
    if (threadIdx.x == 0) row = {value, id, is_bad, is_complete || is_bad};
  }
  __syncthreads();
  return row;
}

// What is kept of a row, in shared memory.
struct FewMemory {
  Candidate kept[kMaxScannedTopK];
  uint32_t mass[kMaxScannedTopK];  // of the kept, then of those that may be drawn
  uint32_t drawable[kMaxScannedTopK];
  int32_t token;
};

// Draws among the row's top_k; -1 if nothing has mass. `all`: room for every candidate, in shared memory.
__device__ inline int draw_among_few(const PieceSummary* pieces, int num_pieces, const RowSampling& sampling,
                                     int kv_len, float largest, Candidate* all, FewMemory& memory) {
  const int thread = static_cast<int>(threadIdx.x);
  // 1. Gather: the pieces' candidates one after the other.
  int count = 0;
  for (int piece = 0; piece < num_pieces; ++piece) {
    const int of_piece = pieces[piece].num_candidates;
    if (thread < of_piece) all[count + thread] = pieces[piece].candidates[thread];
    count += of_piece;
  }
  if (thread == 0) memory.token = -1;
  __syncthreads();

  // 2. The top_k of them by logit, then id; their probabilities.
  const int num_kept = min(sampling.top_k, count);
  const float top = largest / sampling.temperature;
  for (int i = thread; i < count; i += kSampleThreads) {
    const Candidate mine = all[i];
    int rank = 0;
    for (int j = 0; j < count && rank < num_kept; ++j) {
      rank += all[j].value > mine.value || (all[j].value == mine.value && all[j].id < mine.id) ? 1 : 0;
    }
    if (rank >= num_kept) continue;
    const float probability = expf(mine.value - top);
    memory.kept[rank] = {probability, mine.id};
    memory.mass[rank] = mass_of(probability);
  }
  __syncthreads();

  // 3. Those that top_p and min_p leave: the mass of more probable ones, or as probable ones before, is below the
  // target.
  if (thread < num_kept) {
    const Candidate mine = memory.kept[thread];
    uint64_t total = 0;
    uint64_t above = 0;
    for (int j = 0; j < num_kept; ++j) {
      const Candidate& other = memory.kept[j];
      total += memory.mass[j];
      const bool is_before = other.value > mine.value || (other.value == mine.value && other.id < mine.id);
      above += is_before ? memory.mass[j] : 0;
    }
    const double target = ceil(static_cast<double>(sampling.top_p) * static_cast<double>(total));
    const uint64_t wanted = min(max(static_cast<uint64_t>(target), static_cast<uint64_t>(1)), total);
    const bool is_left = (sampling.top_p >= 1.0f || above < wanted) && mine.value >= sampling.min_p;
    memory.drawable[thread] = is_left ? memory.mass[thread] : 0;
  }
  __syncthreads();

  // 4. The inverse of their cumulative distribution, in vocabulary order.
  if (thread < num_kept) {
    const int id = memory.kept[thread].id;
    uint64_t total = 0;
    uint64_t before = 0;
    for (int j = 0; j < num_kept; ++j) {
      total += memory.drawable[j];
      before += memory.kept[j].id < id ? memory.drawable[j] : 0;
    }
    const uint32_t uniform = philox_first_word(sampling.seed, static_cast<uint32_t>(kv_len)) >> 8;
    const uint64_t target = __umul64hi(total, uniform) << 40 | (total * uniform) >> 24;
    if (before <= target && target < before + memory.drawable[thread]) memory.token = id;
  }
  __syncthreads();
  return memory.token;
}

}  // namespace headway::cuda
