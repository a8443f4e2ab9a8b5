// The token of a row that samples among its top_k, from the candidates that the scan of its pieces left. A histogram
// finds about top_k of them; those are compared with each other.
#pragma once

#include "cuda/common/philox.cuh"
#include "cuda/sample_scan.cuh"
#include "cuda/sample_select.cuh"

namespace headway::cuda {

inline constexpr int kFewBins = 1024;
inline constexpr int kMaxFound = 256;

struct FewMemory {
  uint32_t bins[kFewBins];
  uint32_t counts[kFinishThreads / kWarpSize];
  int32_t last_bin;
  int32_t num_found;
  int32_t token;
  Candidate found[kMaxFound];
  Candidate kept[kMaxScannedTopK];  // best first
  float probability[kMaxScannedTopK];
  uint32_t mass[kMaxScannedTopK];
  uint32_t drawable[kMaxScannedTopK];
};

// One row, by the block that ends it. All threads call all of it.
class FewRow {
 public:
  __device__ FewRow(const PieceSummary* pieces, int count, const RowSampling& sampling, float largest, float floor,
                    FewMemory& memory)
      : pieces_(pieces),
        count_(count),
        sampling_(sampling),
        largest_(largest),
        floor_(floor),
        bins_per_unit_(static_cast<float>(kFewBins - 1) / (largest - floor)),
        memory_(memory) {}

  // -1: more ties than the scan takes.
  __device__ int draw(int kv_len) {
    fill_bins();
    find_last_bin();
    find();
    if (memory_.num_found > kMaxFound) return -1;
    const int num_kept = min(sampling_.top_k, memory_.num_found);
    keep(num_kept);
    filter(num_kept);
    return choose(num_kept, philox_first_word(sampling_.seed, static_cast<uint32_t>(kv_len)) >> 8);
  }

 private:
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }

  template <typename Body>
  __device__ void for_each_candidate(Body body) {
    for (int piece = thread() / kWarpSize; piece < count_; piece += kFinishThreads / kWarpSize) {
      const int size = pieces_[piece].num_candidates;
      for (int i = thread() % kWarpSize; i < size; i += kWarpSize) {
        const Candidate candidate = pieces_[piece].candidates[i];
        if (candidate.logit >= floor_) body(candidate);
      }
    }
  }

  __device__ int bin_of(float logit) const {
    return static_cast<int>(
        min(__float2uint_rz((largest_ - logit) * bins_per_unit_), static_cast<uint32_t>(kFewBins - 1)));
  }

  __device__ void fill_bins() {
    for (int i = thread(); i < kFewBins; i += kFinishThreads) memory_.bins[i] = 0;
    if (thread() == 0) {
      memory_.last_bin = kFewBins - 1;
      memory_.num_found = 0;
      memory_.token = -1;
    }
    __syncthreads();
    for_each_candidate([&](const Candidate& candidate) { atomicAdd(&memory_.bins[bin_of(candidate.logit)], 1u); });
    __syncthreads();
  }

  // The bin in which the count from the top reaches top_k; the last one if it never does.
  __device__ void find_last_bin() {
    constexpr int kThreadBins = kFewBins / kFinishThreads;
    const int lane = thread() % kWarpSize;
    const int warp = thread() / kWarpSize;
    const auto top_k = static_cast<uint32_t>(sampling_.top_k);
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) mine += memory_.bins[thread() * kThreadBins + i];
    uint32_t inclusive = mine;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint32_t other = __shfl_up_sync(kFullWarp, inclusive, offset);
      if (lane >= offset) inclusive += other;
    }
    if (lane == kWarpSize - 1) memory_.counts[warp] = inclusive;
    __syncthreads();
    uint32_t before = inclusive - mine;
    for (int i = 0; i < warp; ++i) before += memory_.counts[i];
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) {
      const int bin = thread() * kThreadBins + i;
      const uint32_t after = before + memory_.bins[bin];
      if (before < top_k && top_k <= after) memory_.last_bin = bin;
      before = after;
    }
    __syncthreads();
  }

  __device__ void find() {
    const int last_bin = memory_.last_bin;
    for_each_candidate([&](const Candidate& candidate) {
      if (bin_of(candidate.logit) > last_bin) return;
      const int place = atomicAdd(&memory_.num_found, 1);
      if (place < kMaxFound) memory_.found[place] = candidate;
    });
    __syncthreads();
  }

  // The first num_kept by logit, then id, in that order.
  __device__ void keep(int num_kept) {
    if (thread() < memory_.num_found) {
      const Candidate mine = memory_.found[thread()];
      int rank = 0;
      for (int i = 0; i < memory_.num_found; ++i) {
        const Candidate other = memory_.found[i];
        rank += other.logit > mine.logit || (other.logit == mine.logit && other.id < mine.id) ? 1 : 0;
      }
      if (rank < num_kept) {
        const float top = largest_ / sampling_.temperature;
        memory_.kept[rank] = mine;
        memory_.probability[rank] = expf(mine.logit / sampling_.temperature - top);
        memory_.mass[rank] = mass_of(memory_.probability[rank]);
      }
    }
    __syncthreads();
  }

  // top_p keeps those before which less than its share of the mass lies.
  __device__ void filter(int num_kept) {
    if (thread() < num_kept) {
      uint64_t total = 0;
      uint64_t above = 0;
      for (int i = 0; i < num_kept; ++i) {
        total += memory_.mass[i];
        above += i < thread() ? memory_.mass[i] : 0;
      }
      const double target = ceil(static_cast<double>(sampling_.top_p) * static_cast<double>(total));
      const uint64_t wanted = min(max(static_cast<uint64_t>(target), static_cast<uint64_t>(1)), total);
      const bool is_left =
          (sampling_.top_p >= 1.0f || above < wanted) && memory_.probability[thread()] >= sampling_.min_p;
      memory_.drawable[thread()] = is_left ? memory_.mass[thread()] : 0;
    }
    __syncthreads();
  }

  // The inverse of their cumulative distribution, in vocabulary order.
  __device__ int choose(int num_kept, uint32_t uniform) {
    if (thread() < num_kept) {
      const int id = memory_.kept[thread()].id;
      uint64_t total = 0;
      uint64_t before = 0;
      for (int i = 0; i < num_kept; ++i) {
        total += memory_.drawable[i];
        before += memory_.kept[i].id < id ? memory_.drawable[i] : 0;
      }
      const uint64_t target = __umul64hi(total, uniform) << 40 | (total * uniform) >> 24;
      if (before <= target && target < before + memory_.drawable[thread()]) memory_.token = id;
    }
    __syncthreads();
    return memory_.token;
  }

  const PieceSummary* pieces_;
  int count_;
  const RowSampling& sampling_;
  float largest_;
  float floor_;
  float bins_per_unit_;
  FewMemory& memory_;
};

}  // namespace headway::cuda
