// The scan of sample_scan.cuh: a block reads one piece of one row into registers, all loads at once.
#include <cuda_runtime_api.h>

#include "cuda/common/chained.cuh"
#include "cuda/sample_edit.cuh"
#include "cuda/sample_scan.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "sample";
constexpr int kScanThreads = 256;
constexpr int kScanBlocks = 3;  // a multiprocessor
constexpr int kScanWarps = kScanThreads / kWarpSize;
constexpr int kThreadLogits = kPieceLogits / kScanThreads;
constexpr int kScanBins = 1024;
constexpr int kThreadBins = kScanBins / kScanThreads;
constexpr float kScanBinsPerUnit = 32.0f;  // of a logit

struct Best {
  float value;
  int id;
};

struct ScanMemory {
  Best best[kScanWarps];
  uint32_t counts[kScanWarps];
  uint32_t bins[kScanBins];  // of values below the piece's largest, in steps
  int last_bin;
  uint32_t num_candidates;
};

// A thread's logits and their places in the piece; -inf beyond its end.
struct ThreadLogits {
  float values[kThreadLogits];
  int size;  // of the piece
  bool is_quad;

  __device__ int place(int i) const {
    const int thread = static_cast<int>(threadIdx.x);
    return is_quad ? (i / 4 * kScanThreads + thread) * 4 + i % 4 : i * kScanThreads + thread;
  }

  __device__ void load(const float* source) {
    is_quad = reinterpret_cast<uintptr_t>(source) % sizeof(float4) == 0 && size % 4 == 0;
    if (is_quad) {
#pragma unroll
      for (int i = 0; i < kThreadLogits; i += 4) {
        const float none = -__int_as_float(0x7f800000);
        float4 quad = make_float4(none, none, none, none);
        if (place(i) < size) quad = __ldg(reinterpret_cast<const float4*>(source + place(i)));
        values[i] = quad.x;
        values[i + 1] = quad.y;
        values[i + 2] = quad.z;
        values[i + 3] = quad.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kThreadLogits; ++i) {
        values[i] = place(i) < size ? source[place(i)] : -__int_as_float(0x7f800000);
      }
    }
  }
};

__device__ Best better(const Best& a, const Best& b) {
  return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

__device__ Best best_of_block(Best mine, ScanMemory& memory) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    mine = better(mine, {__shfl_xor_sync(kFullWarp, mine.value, offset), __shfl_xor_sync(kFullWarp, mine.id, offset)});
  }
  if (threadIdx.x % kWarpSize == 0) memory.best[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  mine = memory.best[0];
#pragma unroll
  for (int warp = 1; warp < kScanWarps; ++warp) mine = better(mine, memory.best[warp]);
  return mine;
}

__device__ __forceinline__ int scan_bin(float value, float top) {
  return static_cast<int>(min(__float2uint_rz((top - value) * kScanBinsPerUnit), static_cast<uint32_t>(kScanBins - 1)));
}

// The bin in which the count of values from the top reaches top_k; the last one if it never does.
__device__ void find_last_bin(ScanMemory& memory, uint32_t top_k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int first = static_cast<int>(threadIdx.x) * kThreadBins;
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kThreadBins; ++i) mine += memory.bins[first + i];
  uint32_t inclusive = mine;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  if (lane == kWarpSize - 1) memory.counts[warp] = inclusive;
  if (threadIdx.x == 0) memory.last_bin = kScanBins - 1;
  __syncthreads();
  uint32_t before = inclusive - mine;
  for (int i = 0; i < warp; ++i) before += memory.counts[i];
#pragma unroll
  for (int i = 0; i < kThreadBins; ++i) {
    const uint32_t after = before + memory.bins[first + i];
    if (before < top_k && top_k <= after) memory.last_bin = first + i;
    before = after;
  }
  __syncthreads();
}

// Leaves every value that may be among the row's top_k: of the piece's bins, from the top, as many as hold top_k.
__device__ void leave_candidates(ThreadLogits& logits, float temperature, int top_k, int begin, float largest,
                                 ScanMemory& memory, PieceSummary& summary) {
  for (int i = static_cast<int>(threadIdx.x); i < kScanBins; i += kScanThreads) memory.bins[i] = 0;
  if (threadIdx.x == 0) memory.num_candidates = 0;
  __syncthreads();
  const float top = largest / temperature;
#pragma unroll
  for (int i = 0; i < kThreadLogits; ++i) {
    logits.values[i] = logits.values[i] / temperature;
    if (logits.place(i) < logits.size) atomicAdd(&memory.bins[scan_bin(logits.values[i], top)], 1u);
  }
  __syncthreads();
  find_last_bin(memory, static_cast<uint32_t>(top_k));
  const int last_bin = memory.last_bin;
#pragma unroll
  for (int i = 0; i < kThreadLogits; ++i) {
    if (logits.place(i) >= logits.size || scan_bin(logits.values[i], top) > last_bin) continue;
    const uint32_t place = atomicAdd(&memory.num_candidates, 1u);
    if (place < kPieceCandidates) summary.candidates[place] = {logits.values[i], begin + logits.place(i)};
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    summary.num_candidates =
        memory.num_candidates <= kPieceCandidates ? static_cast<int32_t>(memory.num_candidates) : -1;
  }
}

__global__ void __launch_bounds__(kScanThreads, kScanBlocks) scan_kernel(const __grid_constant__ SampleParams params) {
  __shared__ ScanMemory memory;
  allow_next_kernel();
  const int index = static_cast<int>(blockIdx.y);
  const int row = params.rows[index];
  const RowSampling& sampling = params.mirror.sampling[row];
  const bool is_left = is_scanned(sampling, params.vocab_size) && !is_edited(sampling, params.kv_lens[index]);
  const float temperature = sampling.temperature;
  if (row == kDummyRow || !is_left) return;

  const int begin = static_cast<int>(blockIdx.x) * kPieceLogits;
  ThreadLogits logits;
  logits.size = min(kPieceLogits, params.vocab_size - begin);
  logits.load(params.logits + index * params.logits_stride + begin);
  Best best{-__int_as_float(0x7f800000), INT32_MAX};
  bool is_bad = false;
#pragma unroll
  for (int i = 0; i < kThreadLogits; ++i) {
    if (logits.place(i) >= logits.size) continue;
    is_bad = is_bad || !(logits.values[i] < __int_as_float(0x7f800000));
    best = better(best, {logits.values[i], begin + logits.place(i)});
  }
  best = best_of_block(best, memory);
  const bool is_any_bad = __syncthreads_or(is_bad) != 0;
  auto& summary = static_cast<PieceSummary*>(params.scan)[index * gridDim.x + blockIdx.x];
  if (threadIdx.x == 0) {
    summary.best_value = best.value;
    summary.best_id = best.id;
    summary.is_bad = is_any_bad ? 1 : 0;
    summary.num_candidates = 0;
  }
  if (temperature != 0.0f) leave_candidates(logits, temperature, sampling.top_k, begin, best.value, memory, summary);
}

}  // namespace

void launch_sample_scan(const SampleParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(num_pieces(params.vocab_size)), static_cast<unsigned>(params.num_sampled));
  scan_kernel<<<grid, kScanThreads, 0, stream>>>(params);
  check_launch(kOp);
}

}  // namespace headway::cuda
