// The end of sample_scan.cuh's rows: their tokens, of what the scan left of their pieces.
#include <cuda_runtime_api.h>

#include "cuda/common/chained.cuh"
#include "cuda/sample_few.cuh"
#include "cuda/sample_mass_row.cuh"
#include "cuda/sample_report.cuh"
#include "cuda/sample_result.cuh"
#include "cuda/sample_scan.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "sample";

struct Peak {
  float largest;   // NaN: not a usable row
  float floor;     // largest of the pieces' floors
  int32_t best_id;
  bool is_complete;
};

struct FinishMemory {
  Peak peak;
  union {
    FewMemory few;
    MassMemory mass;
  };
};

// The largest of the row, by one warp; every thread gets it.
__device__ Peak find_peak(const PieceSummary* pieces, int count, FinishMemory& memory) {
  if (threadIdx.x < kWarpSize) {
    Peak peak{-infinity(), -infinity(), INT32_MAX, true};
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kWarpSize) {
      const PieceSummary& piece = pieces[i];
      const float value = piece.best_value;
      const int id = piece.best_id;
      if (value > peak.largest || (value == peak.largest && id < peak.best_id)) peak.best_id = id;
      peak.largest = max_or_nan(peak.largest, value);
      peak.floor = fmaxf(peak.floor, piece.floor);
      peak.is_complete = peak.is_complete && piece.num_candidates >= 0;
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const float value = __shfl_xor_sync(kFullWarp, peak.largest, offset);
      const int id = __shfl_xor_sync(kFullWarp, peak.best_id, offset);
      if (value > peak.largest || (value == peak.largest && id < peak.best_id)) peak.best_id = id;
      peak.largest = max_or_nan(peak.largest, value);
      peak.floor = fmaxf(peak.floor, __shfl_xor_sync(kFullWarp, peak.floor, offset));
    }
    peak.is_complete = __all_sync(kFullWarp, peak.is_complete) != 0;
    if (threadIdx.x == 0) memory.peak = peak;
  }
  __syncthreads();
  return memory.peak;
}

constexpr int kIncomplete = -2;

// The row's token, kUnusableRow or kIncomplete.
__device__ int pick_token(const SampleParams& params, int index, ScanKind kind, const RowSampling& sampling, int kv_len,
                          FinishMemory& memory) {
  const int count = num_pieces(params.vocab_size);
  const PieceSummary* pieces = ScanSpace(params).pieces + static_cast<int64_t>(index) * count;
  const Peak peak = find_peak(pieces, count, memory);
  if (!(peak.largest < infinity())) return kUnusableRow;
  if (kind == ScanKind::kGreedy) return peak.best_id;
  if (peak.largest == -infinity()) return 0;
  if (!peak.is_complete) return kIncomplete;
  int token = -1;
  if (kind == ScanKind::kFew) {
    if (!(fabsf(peak.largest / sampling.temperature) < infinity())) return kIncomplete;
    token = FewRow(pieces, count, sampling, peak.largest, peak.floor, memory.few).draw(kv_len);
  } else {
    if (!(peak.largest * mass_scale(sampling.temperature) > -kMaxPower / 2)) return kIncomplete;
    token = MassRow(params, index, pieces, sampling, peak.largest, memory.mass).draw(sampling, kv_len);
  }
  return token < 0 ? kIncomplete : token;
}

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ SampleParams params) {
  __shared__ FinishMemory memory;
  allow_next_kernel();
  wait_for_previous_kernel();
  const auto index = static_cast<int>(blockIdx.x);
  const int row = params.rows[index];
  const int kv_len = params.kv_lens[index];
  const RowSampling& sampling = params.mirror.sampling[row];
  const ScanKind kind = scan_kind(sampling, kv_len, params.vocab_size);
  const bool is_dummy = row == kDummyRow;
  int token = kIncomplete;
  if (!is_dummy && kind != ScanKind::kNone) token = pick_token(params, index, kind, sampling, kv_len, memory);
  const bool is_done = is_dummy || token != kIncomplete;
  if (threadIdx.x == 0) ScanSpace(params).is_done[index] = is_done ? 1 : 0;
  if (!is_done) return;
  clear_alternatives(params, index);
  if (!is_dummy) return write_result(params, index, kv_len, token, ResultRow{row, 0, 0.0f, 0, 0, 0});
  if (threadIdx.x == 0) params.results[index] = ResultRow{};
}

}  // namespace

void launch_sample_finish(const SampleParams& params, cudaStream_t stream) {
  launch_chained(kOp, finish_kernel, dim3(static_cast<unsigned>(params.num_sampled)), kFinishThreads, stream, params);
}

}  // namespace headway::cuda
