// The token of a row that is drawn from as a whole, of the masses that the scan left of its pieces. Where top_p or
// min_p cut, the pieces' histograms say in which bin; the values in that bin are read again and compared with each
// other.
#pragma once

#include "cuda/common/philox.cuh"
#include "cuda/sample_mass.cuh"
#include "cuda/sample_select.cuh"

namespace headway::cuda {

inline constexpr int kMaxMembers = 1024;  // of the bin that is cut
inline constexpr int kFinishWarps = kFinishThreads / kWarpSize;
inline constexpr int kNoBin = -1;

struct Member {
  float logit;
  int32_t id;
  float weight;  // in the piece's units
  int32_t piece;
};

struct CutMemory {
  uint64_t halves[2][kMassBins];
  Member members[kMaxMembers];
};

struct MassMemory {
  uint64_t kept[kMaxPieces];   // in the piece's units
  int32_t shifts[kMaxPieces];  // octaves that the piece's unit lies below the row's
  int32_t cuts[kMaxPieces];    // the cut bin among the piece's own, kNoBin where it is empty
  uint64_t scratch[kFinishWarps];
  uint64_t remaining;  // mass wanted of the cut bin
  uint64_t rest;       // of the draw, in the chosen piece's units
  int32_t cut_bin;
  int32_t chosen_piece;
  int32_t num_members;
  int32_t token;
  Candidate border;  // the last that top_p keeps
  union {
    CutMemory cut;
    EditTable edits;  // of the chosen piece
  };
};

// All threads of a block call all of it.
class MassRow {
 public:
  __device__ MassRow(const SampleParams& params, const ScannedRow& row, float largest, MassMemory& memory)
      : params_(params),
        row_(row),
        logits_(params.logits + row.index * params.logits_stride),
        count_(num_pieces(params.vocab_size)),
        scale_(mass_scale(row.sampling.temperature)),
        exponent_(mass_exponent(largest, scale_)),
        least_(row.sampling.min_p * MassScale{scale_, 31.0f - exponent_}.weight(largest)),
        memory_(memory) {
    for (int piece = thread(); piece < count_; piece += kFinishThreads) {
      memory.shifts[piece] = static_cast<int>(fminf(exponent_ - row.pieces[piece].exponent, kMaxShift));
      memory.kept[piece] = row.pieces[piece].mass;
    }
    if (thread() == 0) {
      memory.cut_bin = kMassBins - 1;
      memory.remaining = UINT64_MAX;
      memory.border = {-infinity(), INT32_MAX};
      memory.num_members = 0;
      memory.token = -1;
      memory.chosen_piece = -1;
    }
    __syncthreads();
  }

  // -1: the row does not fit the scan.
  __device__ int draw() {
    if (is_cut(row_.sampling)) {
      if (!has_edits()) return -1;
      find_cut(row_.sampling.top_p);
      sum_above_cut();
      collect_members();
      if (memory_.num_members > kMaxMembers) return -1;
      keep_members();
    }
    choose_piece(philox_first_word(row_.sampling.seed, static_cast<uint32_t>(row_.kv_len)) >> 8);
    return walk();
  }

 private:
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }

  __device__ int shift(int piece) const { return memory_.shifts[piece]; }
  __device__ MassScale scale_of(int piece) const { return {scale_, 31.0f - row_.pieces[piece].exponent}; }
  __device__ int piece_size(int piece) const { return min(kPieceLogits, params_.vocab_size - piece * kPieceLogits); }

  // All of the row's edits, if it has any, are in the summaries.
  __device__ bool has_edits() const {
    static_assert(kMaxPieces <= kFinishThreads);
    return __syncthreads_or(row_.is_edited && thread() < count_ && row_.pieces[thread()].edits.num_edits < 0) == 0;
  }

  __device__ float row_weight(float weight, int shift) const {
    return weight * __int_as_float((127 - shift) << 23);  // exact but where it is below any unit
  }

  // The bin in which the mass from the top reaches top_p, or that min_p cuts, if that is the higher one.
  __device__ void find_cut(float top_p) {
    constexpr int kParts = kFinishThreads / kMassBins;
    static_assert(kParts == 2);
    const int bin = thread() % kMassBins;
    const int part = thread() / kMassBins;
    uint64_t mine = 0;
#pragma unroll 4
    for (int piece = part; piece < count_; piece += kParts) {
      const int by = shift(piece);
      const int local = bin - by * kBinsPerOctave;
      if (local >= 0) mine += row_.pieces[piece].bins[local] >> by;
    }
    memory_.cut.halves[part][bin] = mine;
    __syncthreads();
    mine = part == 0 ? memory_.cut.halves[0][bin] + memory_.cut.halves[1][bin] : 0;
    const uint64_t above = detail::block_exclusive_sum(mine, memory_.scratch);
    uint64_t total = 0;
    for (const uint64_t of_warp : memory_.scratch) total += of_warp;
    const double target = ceil(static_cast<double>(top_p) * static_cast<double>(total));
    const uint64_t wanted = min(max(static_cast<uint64_t>(target), static_cast<uint64_t>(1)), total);
    if (top_p < 1.0f && above < wanted && wanted <= above + mine) {
      memory_.cut_bin = bin;
      memory_.remaining = wanted - above;
    }
    __syncthreads();
    if (thread() == 0 && least_ > 0.0f && mass_bin(least_) < memory_.cut_bin) {
      memory_.cut_bin = mass_bin(least_);
      memory_.remaining = UINT64_MAX;
    }
    __syncthreads();
  }

  // The pieces' kept mass but for the cut bin, a warp a piece.
  __device__ void sum_above_cut() {
    for (int piece = thread() / kWarpSize; piece < count_; piece += kFinishWarps) {
      const int cut = memory_.cut_bin - shift(piece) * kBinsPerOctave;
      uint64_t sum = 0;
      for (int bin = thread() % kWarpSize; bin < cut; bin += kWarpSize) sum += row_.pieces[piece].bins[bin];
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
      if (thread() % kWarpSize != 0) continue;
      memory_.kept[piece] = sum;
      memory_.cuts[piece] = cut >= 0 && row_.pieces[piece].bins[cut] != 0 ? cut : kNoBin;
    }
    __syncthreads();
  }

  // Logits outside these are not in the cut bin; wider than the bin by more than any rounding.
  struct Bounds {
    float low;
    float high;
  };

  __device__ Bounds cut_bounds() const {
    const uint32_t top = __float_as_uint(kMassTop) - (static_cast<uint32_t>(memory_.cut_bin) << kBinShift);
    const bool is_last = memory_.cut_bin == kMassBins - 1;
    const float offset = 31.0f - exponent_;
    const float slack = 1e-3f + 1e-6f * fabsf(offset);
    const float high = (log2f(__uint_as_float(top)) - offset + slack) / scale_;
    const float low = (log2f(__uint_as_float(top - (1u << kBinShift))) - offset - slack) / scale_;
    return {is_last ? -infinity() : low - 1e-6f * fabsf(low), high + 1e-6f * fabsf(high)};
  }

  // Reads the pieces that have something in the cut bin again, several at once.
  __device__ void collect_members() {
    constexpr int kCount = 32;
    constexpr int kSpan = kFinishThreads * kCount;
    static_assert(kPieceLogits % (4 * kFinishThreads) == 0, "an access of the block lies in one piece");
    const Bounds bounds = cut_bounds();
    for (int begin = 0; begin < params_.vocab_size; begin += kSpan) {
      bool is_wanted = false;
      for (int piece = begin / kPieceLogits; piece < min(count_, (begin + kSpan) / kPieceLogits); ++piece) {
        is_wanted = is_wanted || memory_.cuts[piece] != kNoBin;
      }
      if (!is_wanted) continue;
      ThreadLogits<kFinishThreads, kCount> logits;
      logits.load(logits_ + begin, min(kSpan, params_.vocab_size - begin));
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (logits.values[i] >= bounds.low && logits.values[i] <= bounds.high) {
          add_if_member(logits.values[i], begin + logits.place(i), false);
        }
      }
    }
    if (row_.is_edited) collect_edited();
    __syncthreads();
  }

  // A warp a piece.
  __device__ void collect_edited() {
    for (int piece = thread() / kWarpSize; piece < count_; piece += kFinishWarps) {
      if (memory_.cuts[piece] == kNoBin) continue;
      const EditSummary& edits = row_.pieces[piece].edits;
      for (int i = thread() % kWarpSize; i < edits.num_edits; i += kWarpSize) {
        add_if_member(edits.edits[i].logit, edits.edits[i].id, true);
      }
    }
  }

  // is_edited: that is what the row samples from, else the model's own.
  __device__ void add_if_member(float logit, int id, bool is_edited) {
    if (id >= params_.vocab_size) return;
    const int piece = id / kPieceLogits;
    const float weight = scale_of(piece).weight(logit);
    if (mass_bin(weight) != memory_.cuts[piece] || units_of(weight) == 0) return;
    if (row_.is_edited && !is_edited) {
      const uint32_t edited = row_.pieces[piece].edits.is_edited[id % kPieceLogits / 32];
      if ((edited >> id % 32 & 1) != 0 || is_masked(token_mask(params_.mirror, row_.row), id)) return;
    }
    const int place = atomicAdd(&memory_.num_members, 1);
    if (place < kMaxMembers) memory_.cut.members[place] = {logit, id, weight, piece};
  }

  // Some lanes a member.
  __device__ void keep_members() {
    constexpr int kLanes = 4;
    const int count = memory_.num_members;
    for (int first = 0; first < count; first += kFinishThreads / kLanes) {
      const int place = first + thread() / kLanes;
      const Member mine = memory_.cut.members[min(place, count - 1)];
      uint64_t above = 0;
      for (int i = thread() % kLanes; i < count; i += kLanes) {
        const Member& other = memory_.cut.members[i];
        const bool is_before = other.logit > mine.logit || (other.logit == mine.logit && other.id < mine.id);
        above += is_before ? units_of(other.weight) >> shift(other.piece) : 0;
      }
#pragma unroll
      for (int offset = 1; offset < kLanes; offset *= 2) above += __shfl_xor_sync(kFullWarp, above, offset);
      if (place >= count || thread() % kLanes != 0 || above >= memory_.remaining) continue;
      const uint32_t units = units_of(mine.weight);
      const int by = shift(mine.piece);
      if (above + (units >> by) >= memory_.remaining) memory_.border = {mine.logit, mine.id};
      if (row_weight(mine.weight, by) >= least_) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&memory_.kept[mine.piece]), units);
      }
    }
    __syncthreads();
  }

  // The piece where the running mass exceeds uniform / 2^24 of the total; a warp, two pieces a lane.
  __device__ void choose_piece(uint32_t uniform) {
    static_assert(kMaxPieces == 2 * kWarpSize);
    if (thread() < kWarpSize) {
      const int first = 2 * thread();
      uint64_t masses[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) masses[i] = first + i < count_ ? memory_.kept[first + i] >> shift(first + i) : 0;
      uint64_t running = masses[0] + masses[1];
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const uint64_t other = __shfl_up_sync(kFullWarp, running, offset);
        if (thread() >= offset) running += other;
      }
      const uint64_t total = __shfl_sync(kFullWarp, running, kWarpSize - 1);
      const uint64_t target = __umul64hi(total, uniform) << 40 | (total * uniform) >> 24;
      uint64_t before = running - masses[0] - masses[1];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (before <= target && target < before + masses[i]) {
          memory_.chosen_piece = first + i;
          memory_.rest = (target - before) << shift(first + i);
        }
        before += masses[i];
      }
    }
    __syncthreads();
  }

  __device__ bool is_kept(float logit, int id, float weight, int cut, int by) const {
    const int bin = mass_bin(weight);
    if (bin != cut) return bin < cut;
    const Candidate& border = memory_.border;
    const bool is_before = logit > border.logit || (logit == border.logit && id <= border.id);
    return is_before && row_weight(weight, by) >= least_;
  }

  // The token in the chosen piece, each thread with neighbours of the vocabulary.
  __device__ int walk() {
    const int piece = memory_.chosen_piece;
    if (piece < 0) return -1;
    constexpr int kCount = kPieceLogits / kFinishThreads;
    const int first = thread() * kCount;
    const int size = piece_size(piece);
    const int by = shift(piece);
    const int cut = is_cut(row_.sampling) ? memory_.cut_bin - by * kBinsPerOctave : kMassBins;
    const MassScale scale = scale_of(piece);
    const float* source = logits_ + piece * kPieceLogits;
    float values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = first + i < size ? source[first + i] : -infinity();
    if (row_.is_edited) {
      edit_values<kCount>(
          values, [&](int i) { return first + i; }, params_.mirror, row_.row, row_.kv_len, piece * kPieceLogits, size,
          memory_.edits, [](int, float) {});
    }
    uint32_t units[kCount];
    uint64_t mine = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float weight = scale.weight(values[i]);
      units[i] = is_kept(values[i], piece * kPieceLogits + first + i, weight, cut, by) ? units_of(weight) : 0;
      mine += units[i];
    }
    uint64_t running = detail::block_exclusive_sum(mine, memory_.scratch);
    if (running <= memory_.rest && memory_.rest < running + mine) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (running <= memory_.rest && memory_.rest < running + units[i]) {
          memory_.token = piece * kPieceLogits + first + i;
        }
        running += units[i];
      }
    }
    __syncthreads();
    return memory_.token;
  }

  const SampleParams& params_;
  const ScannedRow& row_;
  const float* logits_;
  int count_;
  float scale_;
  float exponent_;  // of the row's unit
  float least_;     // weight, in the row's units, that min_p keeps
  MassMemory& memory_;
};

}  // namespace headway::cuda
