// A row's token by a team of blocks, whatever the row asks for. Each block holds its slice of the row's logits on chip,
// so that the row is read from memory once. Probabilities are summed as integers, so a token is a function of its
// logits and parameters alone: not of the batch, and not of the team's size.
#pragma once

#include "cuda/common/philox.cuh"
#include "cuda/sample_edit.cuh"
#include "cuda/sample_report.cuh"
#include "cuda/sample_result.cuh"
#include "cuda/sample_select.cuh"

namespace headway::cuda {

struct SliceSummary {
  Best best;
  int32_t is_bad;  // NaN or +inf somewhere
};

struct BetterSlice {
  __device__ SliceSummary operator()(const SliceSummary& a, const SliceSummary& b) const {
    return {BetterOf{}(a.best, b.best), a.is_bad | b.is_bad};
  }
};

__device__ inline RowJob load_job(const SampleParams& params, int index) {
  RowJob job;
  job.index = index;
  job.row = params.rows[index];
  job.kv_len = params.targets == nullptr ? params.kv_lens[index] : 0;
  job.logits = params.logits + index * params.logits_stride;
  job.sampling = params.mirror.sampling[job.row];
  const RowSampling& sampling = job.sampling;
  job.is_edited = is_edited(sampling, job.kv_len);
  job.needs_slice =
      job.is_edited || sampling.temperature != 0.0f || sampling.num_logprobs >= 0 || params.targets != nullptr;
  return job;
}

// Reads the slice, once, and keeps it if asked to.
__device__ inline SliceSummary read_slice(const float* source, const Slice& slice, bool is_kept) {
  SliceSummary summary{{-infinity(), INT32_MAX}, 0};
  const auto take = [&](float value, int i) {
    summary.is_bad |= !(value < infinity());
    if (value > summary.best.value || summary.best.id == INT32_MAX) summary.best = {value, slice.begin + i};
    if (is_kept) slice.values[i] = value;
  };
  const int thread = static_cast<int>(threadIdx.x);
  int done = 0;
  if (reinterpret_cast<uintptr_t>(source) % sizeof(float4) == 0) {
    const auto* quads = reinterpret_cast<const float4*>(source);
    done = slice.size / 4 * 4;
#pragma unroll 4
    for (int i = thread; i < slice.size / 4; i += kSampleThreads) {
      const float4 quad = __ldcs(quads + i);
      take(quad.x, 4 * i);
      take(quad.y, 4 * i + 1);
      take(quad.z, 4 * i + 2);
      take(quad.w, 4 * i + 3);
    }
  }
  for (int i = done + thread; i < slice.size; i += kSampleThreads) take(source[i], i);
  return summary;
}

__device__ inline void divide(const Slice& slice, float temperature) {
  for (int i = static_cast<int>(threadIdx.x); i < slice.size; i += kSampleThreads) {
    slice.values[i] = slice.values[i] / temperature;
  }
  __syncthreads();
}

// Logits, divided by the temperature -> exp(logit - top), 0 outside the top k.
__device__ inline void make_probabilities(Team& team, SelectMemory& memory, const RowJob& job, const Slice& slice,
                                          float top, int vocab_size) {
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t floor_bits = 0;
  if (job.sampling.top_k > 0 && job.sampling.top_k < vocab_size) {
    const auto top_k = static_cast<uint64_t>(job.sampling.top_k);
    const Selection found = select_threshold<false>(team, memory, slice, top_k, top);
    floor_bits = found.bits;
    if (found.tied > found.remaining) drop_late_ties(team, slice, found.bits, found.remaining, -infinity());
  }
  for (int i = thread; i < slice.size; i += kSampleThreads) {
    const float value = slice.values[i];
    slice.values[i] = ordered_bits(value) >= floor_bits ? expf(value - top) : 0.0f;
  }
  __syncthreads();
}

// The least probability that top_p and min_p keep; late ones among equals are zeroed.
__device__ inline float probability_floor(Team& team, SelectMemory& memory, const RowJob& job, const Slice& slice) {
  const float min_p = job.sampling.min_p;
  if (job.sampling.top_p >= 1.0f) return min_p;
  uint64_t mass = 0;
  for (int i = static_cast<int>(threadIdx.x); i < slice.size; i += kSampleThreads) mass += mass_of(slice.values[i]);
  mass = team.combine(mass, SumU64{});
  const double target = ceil(static_cast<double>(job.sampling.top_p) * static_cast<double>(mass));
  const auto wanted = min(max(static_cast<uint64_t>(target), static_cast<uint64_t>(1)), mass);
  const Selection found = select_threshold<true>(team, memory, slice, wanted, 1.0f);
  const float threshold = __uint_as_float(found.bits & 0x7fffffffu);
  const uint64_t each = mass_of(threshold);
  const uint64_t num_kept = (found.remaining + each - 1) / each;
  if (found.tied > num_kept * each) drop_late_ties(team, slice, found.bits, num_kept, 0.0f);
  return fmaxf(threshold, min_p);
}

// Inverse of the cumulative distribution in vocabulary order: the first id whose running mass exceeds uniform / 2^24 of
// the total.
__device__ inline int draw(Team& team, const Slice& slice, float floor, uint32_t uniform) {
  constexpr int kWarps = kSampleThreads / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int segment = (slice.size + kSampleThreads - 1) / kSampleThreads * kWarpSize;
  const int begin = min(warp * segment, slice.size);
  const int end = min(begin + segment, slice.size);
  const auto mass_at = [&](int i) -> uint64_t {
    return i < end && slice.values[i] >= floor ? mass_of(slice.values[i]) : 0;
  };

  // Masses of the warps' segments, of the blocks, of the row.
  uint64_t mine = 0;
  for (int i = begin + lane; i < end; i += kWarpSize) mine += mass_at(i);
  team.publish(team.combine_block(mine, SumU64{}));
  uint64_t before = 0;
  uint64_t total = 0;
  for (int rank = 0; rank < team.size(); ++rank) {
    const auto mass = team.published_value<uint64_t>(rank);
    if (rank < team.rank()) before += mass;
    total += mass;
  }
  for (int i = 0; i < min(warp, kWarps); ++i) before += team.warp_value<uint64_t>(i);

  // running > uniform * total / 2^24 in integers: running > floor of it. The product needs up to 75 bits.
  const uint64_t product_high = __umul64hi(total, uniform);
  const uint64_t target = product_high << 40 | (total * uniform) >> 24;
  const uint64_t segment_mass = team.warp_value<uint64_t>(warp);
  int token = -1;
  if (before <= target && target < before + segment_mass) {
    for (int base = begin; token < 0 && base < end; base += kWarpSize) {
      uint64_t running = mass_at(base + lane);
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const uint64_t other = __shfl_up_sync(kFullWarp, running, offset);
        if (lane >= offset) running += other;
      }
      const uint32_t beyond = __ballot_sync(kFullWarp, before + running > target);
      if (beyond != 0) token = slice.begin + base + __ffs(static_cast<int>(beyond)) - 1;
      before += __shfl_sync(kFullWarp, running, kWarpSize - 1);
    }
  }
  return team.combine(token, [](int a, int b) { return max(a, b); });
}

// Logprob and rank of a given token, by the model's own logits.
__device__ inline int score_row(Team& team, const SampleParams& params, const RowJob& job, const Slice& slice,
                                float largest, ResultRow& result) {
  const int token = params.targets[job.index];
  result.logprob = largest;
  result.rank = 1;
  if (largest == -infinity()) return token;
  const LogNormaliser normaliser = normaliser_of(team, slice, largest);
  report_alternatives<false>(team, params, job, slice, normaliser, job.sampling.num_prompt_logprobs);
  const float value = job.logits[token];
  result.logprob = normaliser.logprob(value);
  result.rank = rank_of(team, slice.values, slice, value);
  return token;
}

// Token, or -1 for unusable logits; the logprob parts of `result` are filled where asked for.
__device__ inline int sample_row(Team& team, SelectMemory& memory, const SampleParams& params, const RowJob& job,
                                 const Slice& slice, ResultRow& result) {
  const RowSampling& sampling = job.sampling;
  const SliceSummary raw = team.combine(read_slice(job.logits + slice.begin, slice, job.needs_slice), BetterSlice{});
  if (raw.is_bad != 0) return -1;
  if (params.targets != nullptr) return score_row(team, params, job, slice, raw.best.value, result);

  // Where nothing is left, there is nothing to report but that.
  const bool has_logprobs = sampling.num_logprobs >= 0;
  const bool is_processed = (sampling.flags & kProcessedLogprobs) != 0;
  LogNormaliser normaliser{};
  if (has_logprobs && !is_processed && raw.best.value > -infinity()) {
    normaliser = normaliser_of(team, slice, raw.best.value);
    report_alternatives<false>(team, params, job, slice, normaliser, sampling.num_logprobs);
  }

  Best best = raw.best;
  if (job.is_edited) {
    edit_logits(slice, params.mirror, job.row, job.kv_len, memory.bins.low);
    best = team.combine(best_of_slice(slice, {}, false), BetterOf{});
  }
  int token = best.id;
  // A quotient that overflows leaves no mass to draw by, on which blocks would disagree: the best is taken.
  const float quotient = best.value / sampling.temperature;
  const bool is_drawn = sampling.temperature != 0.0f && fabsf(quotient) < infinity();
  const float top = is_drawn ? quotient : best.value;
  if (is_drawn) divide(slice, sampling.temperature);
  if (has_logprobs && is_processed && top > -infinity()) {
    normaliser = normaliser_of(team, slice, top);
    report_alternatives<true>(team, params, job, slice, normaliser, sampling.num_logprobs);
  }
  if (is_drawn) {
    make_probabilities(team, memory, job, slice, top, params.vocab_size);
    const float floor = probability_floor(team, memory, job, slice);
    const uint32_t uniform = philox_first_word(sampling.seed, static_cast<uint32_t>(job.kv_len)) >> 8;
    token = draw(team, slice, floor, uniform);
  }
  if (has_logprobs && is_processed) {
    const float value = value_of(team, slice, token);  // a probability where it was drawn
    const bool is_left = top > -infinity();
    result.logprob = !is_left ? -infinity() : is_drawn ? logf(value) - normaliser.log_mass : -normaliser.log_mass;
    result.rank = token == best.id ? 1 : rank_of(team, slice.values, slice, value);
  } else if (has_logprobs) {
    const float value = job.logits[token];
    result.logprob = raw.best.value > -infinity() ? normaliser.logprob(value) : -infinity();
    result.rank = token == raw.best.id ? 1 : rank_of(team, job.logits + slice.begin, slice, value);
  }
  return token;
}

// One row, by all blocks of its team.
__device__ inline void sample_one(Team& team, SelectMemory& memory, const SampleParams& params, int index,
                                  const Slice& slice) {
  const RowJob job = load_job(params, index);
  ResultRow result{job.row, 0, 0.0f, 0, 0, 0};
  if (team.rank() == 0) clear_alternatives(params, index);
  if (job.row == kDummyRow) {
    if (team.rank() == 0 && threadIdx.x == 0) params.results[index] = result;
    return;
  }
  __syncthreads();  // alternatives are cleared before they are written
  const int token = sample_row(team, memory, params, job, slice, result);
  if (team.rank() == 0) write_result(params, index, job.kv_len, token, result);
  team.sync();  // no block may go on while another reads its memory
}

}  // namespace headway::cuda
