// The scan of sample_scan.cuh: what a block leaves of one piece.
#include <cuda_runtime_api.h>

#include "cuda/common/chained.cuh"
#include "cuda/sample_mass.cuh"
#include "cuda/sample_scan.cuh"
#include "cuda/sample_select.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "sample";
constexpr int kScanBlocks = 4;  // a multiprocessor
constexpr int kScanWarps = kScanThreads / kWarpSize;
constexpr int kThreadLogits = kPieceLogits / kScanThreads;
using PieceThread = ThreadLogits<kScanThreads, kThreadLogits>;
constexpr int kFloorSteps = 24;
constexpr int kFloorSlack = 8;

struct PieceMemory {
  float largest[kScanWarps];
  uint64_t mass[kScanWarps];
  int32_t best_id;
  int32_t num_candidates;
  uint32_t low[kMassBins];  // 64-bit sums in two words: 64-bit atomics on shared memory are emulated
  uint32_t high[kMassBins];
};

__device__ float largest_of_block(float mine, PieceMemory& memory) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    mine = max_or_nan(mine, __shfl_xor_sync(kFullWarp, mine, offset));
  }
  if (threadIdx.x % kWarpSize == 0) memory.largest[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  float largest = memory.largest[0];
#pragma unroll
  for (int warp = 1; warp < kScanWarps; ++warp) largest = max_or_nan(largest, memory.largest[warp]);
  return largest;
}

// The lowest id of the largest value.
__device__ void find_best(const PieceThread& logits, float mine, float largest, int begin, PieceMemory& memory,
                          PieceSummary& summary) {
  if (mine == largest) {
    int id = INT32_MAX;
#pragma unroll
    for (int i = kThreadLogits - 1; i >= 0; --i) id = logits.values[i] == largest ? begin + logits.place(i) : id;
    atomicMin(&memory.best_id, id);
  }
  __syncthreads();
  if (threadIdx.x == 0) summary.best_id = memory.best_id;
}

__device__ __forceinline__ float value_of_bits(uint32_t ordered) {
  return __uint_as_float((ordered & 0x80000000u) != 0 ? ordered & 0x7fffffffu : ~ordered);
}

// A value that at least `count` threads' largest reach, and few more: so many of the piece's values reach it as well.
__device__ float find_floor(float mine, float largest, int count) {
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
__device__ void leave_candidates(const PieceThread& logits, float floor, int begin, PieceMemory& memory,
                                 PieceSummary& summary) {
#pragma unroll
  for (int i = 0; i < kThreadLogits; ++i) {
    if (!(logits.values[i] >= floor)) continue;
    const int place = atomicAdd(&memory.num_candidates, 1);
    if (place < kPieceCandidates) summary.candidates[place] = {logits.values[i], begin + logits.place(i)};
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  summary.num_candidates = memory.num_candidates <= kPieceCandidates ? memory.num_candidates : -1;
  summary.floor = floor;
}

__device__ void add_to_bin(PieceMemory& memory, float weight) {
  const uint32_t units = units_of(weight);
  if (units == 0) return;
  const int bin = mass_bin(weight);
  const uint32_t old = atomicAdd(&memory.low[bin], units);
  if (old + units < old) atomicAdd(&memory.high[bin], 1u);
}

__device__ void leave_mass(const PieceThread& logits, float largest, const RowSampling& sampling, PieceMemory& memory,
                           PieceSummary& summary) {
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
  const bool is_cut = sampling.top_p < 1.0f || sampling.min_p > 0.0f;
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t mass = 0;
  if (is_cut) {
    for (int i = thread; i < kMassBins; i += kScanThreads) memory.low[i] = memory.high[i] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i) add_to_bin(memory, scale.weight(logits.values[i]));
    __syncthreads();
    for (int i = thread; i < kMassBins; i += kScanThreads) {
      summary.bins[i] = memory.low[i] | static_cast<uint64_t>(memory.high[i]) << 32;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i) mass += units_of(scale.weight(logits.values[i]));
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) mass += __shfl_xor_sync(kFullWarp, mass, offset);
    if (thread % kWarpSize == 0) memory.mass[thread / kWarpSize] = mass;
    __syncthreads();
    mass = 0;
    for (const uint64_t of_warp : memory.mass) mass += of_warp;
  }
  if (thread != 0) return;
  summary.exponent = exponent;
  summary.mass = mass;
  summary.num_candidates = 0;
}

__device__ void summarise_piece(const PieceThread& logits, ScanKind kind, const RowSampling& sampling, int begin,
                                PieceMemory& memory, PieceSummary& summary) {
  float mine = logits.values[0];
#pragma unroll
  for (int i = 1; i < kThreadLogits; ++i) mine = max_or_nan(mine, logits.values[i]);
  if (threadIdx.x == 0) {
    memory.best_id = INT32_MAX;
    memory.num_candidates = 0;
  }
  const float largest = largest_of_block(mine, memory);
  const bool is_usable = largest < infinity();
  if (threadIdx.x == 0) {
    summary.best_value = is_usable ? largest : __int_as_float(0x7fc00000);
    summary.best_id = INT32_MAX;  // below, each kind writes what it needs of the rest; the row's block reads all
    summary.floor = -infinity();
    summary.num_candidates = 0;
  }
  if (!is_usable) return;
  if (kind == ScanKind::kGreedy) return find_best(logits, mine, largest, begin, memory, summary);
  if (kind == ScanKind::kMass) return leave_mass(logits, largest, sampling, memory, summary);
  leave_candidates(logits, find_floor(mine, largest, sampling.top_k), begin, memory, summary);
}

__global__ void __launch_bounds__(kScanThreads, kScanBlocks) scan_kernel(const __grid_constant__ SampleParams params) {
  __shared__ PieceMemory memory;
  allow_next_kernel();
  wait_for_previous_kernel();
  const auto index = static_cast<int>(blockIdx.y);
  const int begin = static_cast<int>(blockIdx.x) * kPieceLogits;
  PieceThread logits;  // loaded before it is known whether the row wants it
  logits.load(params.logits + index * params.logits_stride + begin, min(kPieceLogits, params.vocab_size - begin));
  const int row = params.rows[index];
  const RowSampling& sampling = params.mirror.sampling[row];
  const ScanKind kind = scan_kind(sampling, params.kv_lens[index], params.vocab_size);
  if (row == kDummyRow || kind == ScanKind::kNone) return;
  PieceSummary* pieces = ScanSpace(params).pieces + static_cast<int64_t>(index) * gridDim.x;
  summarise_piece(logits, kind, sampling, begin, memory, pieces[blockIdx.x]);
}

}  // namespace

void launch_sample_scan(const SampleParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(num_pieces(params.vocab_size)), static_cast<unsigned>(params.num_sampled));
  launch_chained(kOp, scan_kernel, grid, kScanThreads, stream, params);
}

}  // namespace headway::cuda
