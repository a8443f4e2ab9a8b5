// The sampler: one row of logits to one token, by the definition in docs/shapes.md's terms: bias, token mask, bad
// words, stop masking, penalties, temperature, top_k, top_p, min_p, inverse CDF in vocabulary order. Sums of
// probabilities are of fp32 lanes within a block and of doubles across blocks.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "cpu/best.h"
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/variants.h"

namespace headway::cpu::HEADWAY_SIMD {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int32_t kMaxId = std::numeric_limits<int32_t>::max();
constexpr int64_t kBlock = 512;  // values whose masses are summed in fp32

// One row's part of the call.
struct Row {
  const SampleParams& params;
  int64_t index;  // in the step
  int32_t id;
  const RowSampling& sampling;
  const float* logits;
  int64_t vocab_size;
  int32_t kv_len;

  const int32_t* stop_ids() const { return params.mirror.stop_ids + int64_t{id} * kMaxStopIds; }
  const int32_t* history() const { return params.mirror.history + int64_t{id} * params.mirror.max_model_len; }
  bool has_mask() const { return (sampling.flags & kHasTokenMask) != 0; }
  bool reports_processed() const { return (sampling.flags & kProcessedLogprobs) != 0; }
};

struct Peak {
  float value;
  int32_t id;  // lowest of those with this value
  bool is_bad;  // NaN or +inf among the values
};

Peak find_peak(const float* values, int64_t count) {
  F32 best = broadcast(kMinusInfinity);
  I32 best_ids{};
  I32 ids;
  for (int lane = 0; lane < kLanes; ++lane) ids[lane] = lane;
  I32 nans{};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const F32 value = load(values + i);
    nans |= value != value;
    best_ids = value > best ? ids : best_ids;
    best = value > best ? value : best;
    ids += kLanes;
  }
  Peak peak{kMinusInfinity, 0, false};
  for (int lane = 0; lane < kLanes; ++lane) {
    peak.is_bad |= nans[lane] != 0;
    if (best[lane] > peak.value || (best[lane] == peak.value && best_ids[lane] < peak.id)) {
      peak = {best[lane], best_ids[lane], peak.is_bad};
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    peak.is_bad |= std::isnan(values[i]);
    if (values[i] > peak.value) peak = {values[i], static_cast<int32_t>(i), peak.is_bad};
  }
  peak.is_bad |= peak.value == -kMinusInfinity;
  return peak;
}

bool has_penalties(const RowSampling& sampling) {
  return sampling.repetition_penalty != 1.0f || sampling.presence_penalty != 0.0f || sampling.frequency_penalty != 0.0f;
}

bool needs_adjusting(const Row& row) {
  const bool masks_stops = row.kv_len < row.sampling.min_total_len && row.sampling.num_stop_ids > 0;
  return row.sampling.num_logit_bias > 0 || row.has_mask() || row.sampling.num_bad_words > 0 || masks_stops ||
         has_penalties(row.sampling);
}

void drop_masked(const Row& row, float* values) {
  const uint32_t* mask = row.params.mirror.token_masks + int64_t{row.id} * row.params.mirror.mask_words;
  for (int64_t i = 0; i < row.vocab_size; ++i) {
    values[i] = (mask[i / 32] >> (i % 32) & 1) != 0 ? values[i] : kMinusInfinity;
  }
}

// A bad word's last token cannot follow the others of it.
void drop_bad_words(const Row& row, float* values) {
  const int32_t* ends = row.params.mirror.bad_words + int64_t{row.id} * kMaxBadWordEntries;
  const int32_t* tokens = ends + row.sampling.num_bad_words;
  for (int32_t i = 0; i < row.sampling.num_bad_words; ++i) {
    const int32_t* word = tokens + (i == 0 ? 0 : ends[i - 1]);
    const int32_t num_before = static_cast<int32_t>(tokens + ends[i] - word) - 1;
    if (num_before > row.kv_len) continue;
    if (!std::equal(word, word + num_before, row.history() + row.kv_len - num_before)) continue;
    values[word[num_before]] = kMinusInfinity;
  }
}

void penalise(const Row& row, float* values) {
  const RowSampling& sampling = row.sampling;
  const std::unique_ptr<int32_t[]> counts(new int32_t[static_cast<size_t>(row.vocab_size)]());
  const int32_t* history = row.history();
  const int32_t length = std::min(row.kv_len, row.params.mirror.max_model_len);
  for (int32_t i = 0; i < length; ++i) {
    float& value = values[history[i]];
    if (counts[history[i]]++ != 0) continue;
    value = value > 0.0f ? value / sampling.repetition_penalty : value * sampling.repetition_penalty;
  }
  for (int32_t i = 0; i < length; ++i) counts[history[i]] = 0;
  for (int32_t i = sampling.prompt_len; i < length; ++i) ++counts[history[i]];
  for (int32_t i = sampling.prompt_len; i < length; ++i) {
    int32_t& count = counts[history[i]];
    if (count == 0) continue;
    values[history[i]] -= sampling.frequency_penalty * static_cast<float>(count) + sampling.presence_penalty;
    count = 0;
  }
}

// The logits after bias, masking and penalties.
void adjust(const Row& row, float* values) {
  const int64_t bias_begin = int64_t{row.id} * kMaxLogitBias;
  std::memcpy(values, row.logits, static_cast<size_t>(row.vocab_size) * sizeof(float));
  for (int32_t i = 0; i < row.sampling.num_logit_bias; ++i) {
    values[row.params.mirror.bias_ids[bias_begin + i]] += row.params.mirror.bias_values[bias_begin + i];
  }
  if (row.has_mask()) drop_masked(row, values);
  drop_bad_words(row, values);
  if (row.kv_len < row.sampling.min_total_len) {
    for (int32_t i = 0; i < row.sampling.num_stop_ids; ++i) values[row.stop_ids()[i]] = kMinusInfinity;
  }
  if (has_penalties(row.sampling)) penalise(row, values);
}

// exp(value - peak) per value; lanes beyond count are 0.
F32 mass_part(const float* values, float peak, int64_t count) {
  F32 mass = exp(load_part(values, count) - peak);
  for (int64_t lane = count; lane < kLanes; ++lane) mass[lane] = 0.0f;
  return mass;
}

double sum_block(const float* masses, int64_t count) {
  F32 sum{};
  for (int64_t i = 0; i < count; i += kLanes) sum += load_part(masses + i, count - i);
  return reduce_add(sum);
}

double mass_of(const Candidate& candidate, float peak) {
  return exp(broadcast(candidate.value - peak))[0];
}

// The worst token that top_k and then top_p keep: the k best are few enough to be sorted.
Candidate find_border_of_top_k(const RowSampling& sampling, const float* scaled, int64_t count, float peak) {
  BestList best(sampling.top_k);
  best.collect(scaled, count);
  const int64_t last = best.size() - 1;
  if (sampling.top_p >= 1.0f) return best[last];
  double total = 0.0;
  for (int64_t i = 0; i < best.size(); ++i) total += mass_of(best[i], peak);
  double reached = 0.0;
  for (int64_t i = 0; i < last; ++i) {
    reached += mass_of(best[i], peak);
    if (reached >= double{sampling.top_p} * total) return best[i];
  }
  return best[last];
}

// Buckets of width 1/16 below the peak; the last takes all that is further than 64 below, e^-64 of the peak's mass.
constexpr int kNumBuckets = 1024;

int bucket_of(float value, float peak) {
  const float distance = (peak - value) * 16.0f;
  return distance < static_cast<float>(kNumBuckets - 1) ? static_cast<int>(distance) : kNumBuckets - 1;
}

// The worst token that top_p keeps. Buckets fall in probability, so only the one where the mass reaches top_p is
// sorted.
Candidate find_border_of_top_p(float top_p, const float* scaled, const float* masses, int64_t count, float peak) {
  double bucket_masses[kNumBuckets] = {};
  int32_t sizes[kNumBuckets] = {};
  for (int64_t i = 0; i < count; ++i) {
    const int bucket = bucket_of(scaled[i], peak);
    bucket_masses[bucket] += masses[i];
    ++sizes[bucket];
  }
  double total = 0.0;
  for (const double mass : bucket_masses) total += mass;
  const double wanted = double{top_p} * total;
  double reached = 0.0;
  int border = 0;
  for (; border < kNumBuckets - 1 && reached + bucket_masses[border] < wanted; ++border) {
    reached += bucket_masses[border];
  }

  if (sizes[border] == 0) return {kMinusInfinity, kMaxId};  // by rounding the mass fell just short: keep all
  const std::unique_ptr<Candidate[]> members(new Candidate[static_cast<size_t>(sizes[border])]);
  int32_t size = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (bucket_of(scaled[i], peak) == border) members[size++] = {scaled[i], static_cast<int32_t>(i)};
  }
  std::sort(members.get(), members.get() + size, IsBetter{});
  for (int32_t i = 0; i + 1 < size; ++i) {
    reached += masses[members[i].id];
    if (reached >= wanted) return members[i];
  }
  return members[size - 1];
}

void drop_beyond(const Candidate& border, const float* scaled, float* masses, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const bool is_kept = scaled[i] > border.value || (scaled[i] == border.value && i <= border.id);
    masses[i] = is_kept ? masses[i] : 0.0f;
  }
}

void drop_below(float least, float* masses, int64_t count) {
  for (int64_t i = 0; i < count; ++i) masses[i] = masses[i] >= least ? masses[i] : 0.0f;
}

// Smallest id whose cumulative mass exceeds uniform * total.
int32_t invert(const float* masses, int64_t count, float uniform) {
  double total = 0.0;
  for (int64_t i = 0; i < count; i += kBlock) total += sum_block(masses + i, std::min(kBlock, count - i));
  const double target = double{uniform} * total;
  double reached = 0.0;
  int64_t last = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin);
    const double after = reached + sum_block(masses + begin, size);
    if (after > target) {
      for (int64_t i = begin; i < begin + size; ++i) {
        if (masses[i] == 0.0f) continue;
        last = i;
        reached += masses[i];
        if (reached > target) break;
      }
      return static_cast<int32_t>(last);  // by rounding the walk may end just short: then the block's last
    }
    reached = after;
  }
  return static_cast<int32_t>(last);
}

int32_t draw(const Row& row, const float* values, float peak) {
  const RowSampling& sampling = row.sampling;
  const int64_t count = row.vocab_size;
  const std::unique_ptr<float[]> memory(new float[2 * static_cast<size_t>(count)]);
  float* scaled = memory.get();
  float* masses = scaled + count;
  const float top = peak / sampling.temperature;
  for (int64_t i = 0; i < count; i += kLanes) {
    store_part(scaled + i, load_part(values + i, count - i) / sampling.temperature, count - i);
    store_part(masses + i, mass_part(scaled + i, top, count - i), count - i);
  }
  if (sampling.top_k > 0 && sampling.top_k < count) {
    drop_beyond(find_border_of_top_k(sampling, scaled, count, top), scaled, masses, count);
  } else if (sampling.top_p < 1.0f) {
    drop_beyond(find_border_of_top_p(sampling.top_p, scaled, masses, count, top), scaled, masses, count);
  }
  if (sampling.min_p > 0.0f) drop_below(sampling.min_p, masses, count);
  return invert(masses, count, philox_uniform(sampling.seed, static_cast<uint32_t>(row.kv_len)));
}

// Whether there is a distribution to draw from: not where nothing but -inf is left, nor where the largest quotient
// overflows.
bool is_drawn(const Row& row, float peak) {
  return row.sampling.temperature != 0.0f && std::isfinite(peak / row.sampling.temperature);
}

int32_t choose_from(const Row& row, const float* values, const Peak& peak) {
  return is_drawn(row, peak.value) ? draw(row, values, peak.value) : peak.id;
}

// Log-probability and rank of result.token, and the best alternatives, by `values` whose largest is `peak`.
void report(const Row& row, const float* values, float peak, int32_t num_alternatives, ResultRow& result) {
  if (peak == kMinusInfinity) {  // nothing is left
    result.rank = 1;
    result.logprob = kMinusInfinity;
    return;
  }
  double total = 0.0;
  for (int64_t begin = 0; begin < row.vocab_size; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, row.vocab_size);
    F32 sum{};
    for (int64_t i = begin; i < end; i += kLanes) sum += mass_part(values + i, peak, end - i);
    total += reduce_add(sum);
  }
  const double log_total = std::log(total) + double{peak};
  const float chosen = values[result.token];
  int32_t rank = 1;
  for (int64_t i = 0; i < row.vocab_size; ++i) rank += values[i] > chosen ? 1 : 0;
  result.rank = rank;
  result.logprob = static_cast<float>(double{chosen} - log_total);

  const int64_t num_tops = std::min({int64_t{num_alternatives}, int64_t{row.params.max_logprobs}, row.vocab_size});
  if (num_tops <= 0) return;
  BestList best(num_tops);
  best.collect(values, row.vocab_size);
  for (int64_t i = 0; i < num_tops; ++i) {
    row.params.top_ids[row.index * row.params.max_logprobs + i] = best[i].id;
    row.params.top_logprobs[row.index * row.params.max_logprobs + i] =
        static_cast<float>(double{best[i].value} - log_total);
  }
}

// By what is sampled from: `values` scaled by the temperature.
void report_processed(const Row& row, const float* values, float peak, ResultRow& result) {
  const float temperature = is_drawn(row, peak) ? row.sampling.temperature : 1.0f;
  const std::unique_ptr<float[]> scaled(new float[static_cast<size_t>(row.vocab_size)]);
  for (int64_t i = 0; i < row.vocab_size; ++i) scaled[i] = values[i] / temperature;
  report(row, scaled.get(), peak / temperature, row.sampling.num_logprobs, result);
}

void choose_and_report(const Row& row, const Peak& raw_peak, ResultRow& result) {
  std::unique_ptr<float[]> adjusted;
  const float* values = row.logits;
  Peak peak = raw_peak;
  if (needs_adjusting(row)) {
    adjusted.reset(new float[static_cast<size_t>(row.vocab_size)]);
    adjust(row, adjusted.get());
    values = adjusted.get();
    peak = find_peak(values, row.vocab_size);
  }
  result.token = choose_from(row, values, peak);
  if (row.sampling.num_logprobs < 0) return;
  if (row.reports_processed()) {
    report_processed(row, values, peak.value, result);
  } else {
    report(row, row.logits, raw_peak.value, row.sampling.num_logprobs, result);
  }
}

bool is_stopped(const Row& row, int32_t token) {
  if (row.kv_len + 1 >= row.sampling.max_total_len) return true;
  if (row.kv_len < row.sampling.min_total_len) return false;
  const int32_t* end = row.stop_ids() + row.sampling.num_stop_ids;
  return std::find(row.stop_ids(), end, token) != end;
}

void sample_row(const SampleParams& params, int64_t index) {
  ResultRow& result = params.results[index];
  result = {};
  for (int64_t i = 0; i < params.max_logprobs; ++i) {
    params.top_ids[index * params.max_logprobs + i] = -1;
    params.top_logprobs[index * params.max_logprobs + i] = 0.0f;
  }
  const int32_t id = params.rows[index];
  if (id == kDummyRow) return;
  result.row = id;
  const Row row{params,
                index,
                id,
                params.mirror.sampling[id],
                params.logits + index * params.logits_stride,
                params.vocab_size,
                params.targets == nullptr ? params.kv_lens[index] : 0};
  const Peak peak = find_peak(row.logits, row.vocab_size);
  result.is_bad = peak.is_bad ? 1 : 0;
  if (peak.is_bad) return;
  if (params.targets != nullptr) {
    result.token = params.targets[index];
    report(row, row.logits, peak.value, row.sampling.num_prompt_logprobs, result);
    return;
  }
  choose_and_report(row, peak, result);
  result.is_stopped = is_stopped(row, result.token) ? 1 : 0;
}

}  // namespace

void sample(const SampleParams& params) {
  const int64_t cost = int64_t{params.num_sampled} * params.vocab_size * 4;
  parallel_for(params.num_sampled, cost, [&](int64_t index) { sample_row(params, index); });
}

}  // namespace headway::cpu::HEADWAY_SIMD
