// The sampler: one team of blocks a row, each block holding its slice of the row's logits on chip, so that a row is
// read from memory once whatever it asks for. Greedy rows need only that one pass. Probabilities are summed as
// integers, so a token is a function of its logits and parameters alone: not of the batch, and not of the team's size.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/check.h"
#include "cuda/common/philox.cuh"
#include "cuda/ops.h"
#include "cuda/sample_edit.cuh"
#include "cuda/sample_few.cuh"
#include "cuda/sample_report.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "sample";
constexpr int kSliceAlign = 128;    // so that a slice keeps the row's 16-byte alignment
constexpr int kSliceTarget = 8192;  // a team grows until its slices are no larger, or it is full
constexpr int kSmallTeamCapability = 8;

struct RawSummary {
  Best best;
  int32_t is_bad;  // NaN or +inf somewhere
};

struct BetterSummary {
  __device__ RawSummary operator()(const RawSummary& a, const RawSummary& b) const {
    return {BetterOf{}(a.best, b.best), a.is_bad | b.is_bad};
  }
};

struct SampleMemory {
  TeamMemory team;
  union {
    SelectMemory select;
    FewMemory few;
  };
};

__device__ RowJob load_job(const SampleParams& params, int index) {
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
__device__ RawSummary read_slice(const float* source, const Slice& slice, bool is_kept) {
  RawSummary summary{{-infinity(), INT32_MAX}, 0};
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

__device__ void divide(const Slice& slice, float temperature) {
  for (int i = static_cast<int>(threadIdx.x); i < slice.size; i += kSampleThreads) {
    slice.values[i] = slice.values[i] / temperature;
  }
  __syncthreads();
}

// Logits, divided by the temperature -> exp(logit - top), 0 outside the top k.
__device__ void make_probabilities(Team& team, SelectMemory& memory, const RowJob& job, const Slice& slice, float top,
                                   int vocab_size) {
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
__device__ float probability_floor(Team& team, SelectMemory& memory, const RowJob& job, const Slice& slice) {
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
__device__ int draw(Team& team, const Slice& slice, float floor, uint32_t uniform) {
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

__device__ bool is_stop_id(const DeviceMirror& mirror, const RowJob& job, int token) {
  const int32_t* stop_ids = mirror.stop_ids + static_cast<int64_t>(job.row) * kMaxStopIds;
  for (int i = 0; i < job.sampling.num_stop_ids; ++i) {
    if (stop_ids[i] == token) return true;
  }
  return false;
}

// Logprob and rank of a given token, by the model's own logits.
__device__ int score_row(Team& team, const SampleParams& params, const RowJob& job, const Slice& slice, float largest,
                         ResultRow& result) {
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
__device__ int sample_row(Team& team, SampleMemory& memory, const SampleParams& params, const RowJob& job,
                          const Slice& slice, ResultRow& result) {
  const RowSampling& sampling = job.sampling;
  const RawSummary raw = team.combine(read_slice(job.logits + slice.begin, slice, job.needs_slice), BetterSummary{});
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
    edit_logits(slice, params.mirror, job.row, job.kv_len, memory.select.bins.low);
    best = team.combine(best_of_slice(slice, {}, false), BetterOf{});
  }
  int token = best.id;
  const bool is_drawn = sampling.temperature != 0.0f && best.value > -infinity();
  const float top = is_drawn ? best.value / sampling.temperature : best.value;
  if (is_drawn) divide(slice, sampling.temperature);
  if (has_logprobs && is_processed && top > -infinity()) {
    normaliser = normaliser_of(team, slice, top);
    report_alternatives<true>(team, params, job, slice, normaliser, sampling.num_logprobs);
  }
  if (is_drawn) {
    make_probabilities(team, memory.select, job, slice, top, params.vocab_size);
    const float floor = probability_floor(team, memory.select, job, slice);
    const uint32_t uniform = philox_first_word(sampling.seed, static_cast<uint32_t>(job.kv_len)) >> 8;
    token = draw(team, slice, floor, uniform);
    if (token < 0) token = best.id;  // the temperature is so small that the quotients overflowed
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

// The token of a row that the scan has read.
__device__ int pick_token(SampleMemory& memory, const SampleParams& params, const RowJob& job,
                          const PieceSummary* pieces, const ScannedRow& row, float* on_chip) {
  if (row.is_bad) return -1;
  if (job.sampling.temperature == 0.0f || !(row.best_value > -infinity())) return row.best_id;
  const int token = draw_among_few(pieces, num_pieces(params.vocab_size), job.sampling, job.kv_len, row.best_value,
                                   reinterpret_cast<Candidate*>(on_chip), memory.few);
  return token < 0 ? row.best_id : token;
}

__device__ void report(const SampleParams& params, const RowJob& job, int token, ResultRow& result) {
  result.is_bad = token < 0 ? 1 : 0;
  if (token >= 0) result.token = token;
  if (token >= 0 && params.targets == nullptr) {
    const bool is_end = job.kv_len >= job.sampling.min_total_len && is_stop_id(params.mirror, job, token);
    result.is_stopped = is_end || job.kv_len + 1 >= job.sampling.max_total_len ? 1 : 0;
  }
  if (threadIdx.x == 0) params.results[job.index] = result;
}

template <bool kOnChip>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(SampleParams params, int slice_size) {
  extern __shared__ float4 on_chip[];
  __shared__ SampleMemory memory;
  Team team(memory.team);
  const int index = static_cast<int>(blockIdx.x) / team.size();
  const int begin = min(team.rank() * slice_size, params.vocab_size);
  Slice slice{nullptr, begin, min(slice_size, params.vocab_size - begin)};
  if constexpr (kOnChip) {
    slice.values = reinterpret_cast<float*>(on_chip);
  } else {
    slice.values = params.scratch + static_cast<int64_t>(index) * params.vocab_size + begin;
  }

  wait_for_previous_kernel();
  const RowJob job = load_job(params, index);
  if (team.rank() == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < params.max_logprobs; i += kSampleThreads) {
      params.top_ids[static_cast<int64_t>(index) * params.max_logprobs + i] = -1;
      params.top_logprobs[static_cast<int64_t>(index) * params.max_logprobs + i] = 0.0f;
    }
  }
  __syncthreads();
  ResultRow result{job.row, 0, 0.0f, 0, 0, 0};
  if (job.row == kDummyRow) {
    if (team.rank() == 0 && threadIdx.x == 0) params.results[index] = result;
    return;
  }
  const bool is_sampled = params.targets == nullptr;
  if (kOnChip && is_sampled && !job.is_edited && is_scanned(job.sampling, params.vocab_size)) {
    const int count = num_pieces(params.vocab_size);
    const auto* pieces = static_cast<const PieceSummary*>(params.scan) + static_cast<int64_t>(index) * count;
    const ScannedRow row = summarise(pieces, count, job.sampling.temperature);
    if (row.is_complete) {  // for the whole team: nobody reads another's memory
      if (team.rank() == 0) report(params, job, pick_token(memory, params, job, pieces, row, slice.values), result);
      return;
    }
  }
  const int token = sample_row(team, memory, params, job, slice, result);
  if (team.rank() == 0) report(params, job, token, result);
  team.sync();  // no block may leave while another reads its memory
}

// How a row is spread over blocks: a function of the vocabulary and the device.
struct TeamShape {
  int num_blocks;
  int slice_size;
  bool is_on_chip;
};

// Room for a scanned row's candidates.
int min_slice(int vocab_size) {
  return num_pieces(vocab_size) * kPieceCandidates * static_cast<int>(sizeof(Candidate) / sizeof(float));
}

TeamShape choose_team(const SampleParams& params) {
  int device = 0;
  int capability = 0;
  int max_shared_bytes = 0;
  check(cudaGetDevice(&device), kOp);
  check(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device), kOp);
  check(cudaDeviceGetAttribute(&max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp);
  TeamShape team{1, 0, true};
  const int max_blocks = capability > kSmallTeamCapability ? kMaxTeamBlocks : 1;
  while (team.num_blocks < max_blocks && team.num_blocks * kSliceTarget < params.vocab_size) team.num_blocks *= 2;
  const int share = (params.vocab_size + team.num_blocks - 1) / team.num_blocks;
  team.slice_size = (share + kSliceAlign - 1) / kSliceAlign * kSliceAlign;
  team.slice_size = std::max(team.slice_size, min_slice(params.vocab_size));
  const int64_t slice_bytes = static_cast<int64_t>(team.slice_size) * sizeof(float);
  team.is_on_chip = slice_bytes + static_cast<int64_t>(sizeof(SampleMemory)) <= max_shared_bytes;
  return team;
}

void launch_team(const SampleParams& params, const TeamShape& team, cudaStream_t stream) {
  auto* kernel = team.is_on_chip ? sample_kernel<true> : sample_kernel<false>;
  const int64_t slice_bytes = team.is_on_chip ? static_cast<int64_t>(team.slice_size) * sizeof(float) : 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(slice_bytes)), kOp);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(team.num_blocks), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(params.num_sampled * team.num_blocks));
  config.blockDim = dim3(kSampleThreads);
  config.dynamicSmemBytes = static_cast<size_t>(slice_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = team.num_blocks > 1 ? 2 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params, team.slice_size), kOp);
}

}  // namespace

int64_t sample_scan_bytes(int32_t num_sampled, int32_t vocab_size) {
  return static_cast<int64_t>(num_sampled) * num_pieces(vocab_size) * static_cast<int64_t>(sizeof(PieceSummary));
}

void sample(const SampleParams& params, Stream stream) {
  if (params.num_sampled == 0) return;
  require(params.vocab_size > 0, kOp, "vocab_size must be positive");
  const TeamShape team = choose_team(params);
  require(team.is_on_chip || params.scratch != nullptr, kOp,
          "this device cannot keep a row of the vocabulary on chip: pass scratch [Rs, V]");
  require(params.scan != nullptr, kOp, "scan must have sample_scan_bytes");
  if (team.is_on_chip && params.targets == nullptr) launch_sample_scan(params, static_cast<cudaStream_t>(stream));
  launch_team(params, team, static_cast<cudaStream_t>(stream));
}

}  // namespace headway::cuda
