// The end of sample_scan.cuh's rows: their tokens, of what the scan left of their pieces.
#include <cuda_runtime_api.h>

#include "cuda/common/chained.cuh"
#include "cuda/sample_few.cuh"
#include "cuda/sample_logprobs.cuh"
#include "cuda/sample_mass_row.cuh"
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
    LogprobMemory logprobs;  // once the token is known
  };
};

// Of the row. One warp calls it, all of whose lanes get it.
__device__ __forceinline__ Peak peak_of(const PieceSummary* pieces, int count) {
  uint32_t largest = 0;  // ordered bits, of which NaN has the most
  uint32_t floor = 0;
  int32_t best_id = INT32_MAX;
  bool is_complete = true;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kWarpSize) {
    const PieceSummary& piece = pieces[i];
    const uint32_t bits = ordered_bits(piece.best_value);
    if (bits > largest) best_id = piece.best_id;  // of equals the first
    largest = max(largest, bits);
    floor = max(floor, ordered_bits(piece.floor));
    is_complete = is_complete && piece.num_candidates >= 0;
  }
  const uint32_t of_row = __reduce_max_sync(kFullWarp, largest);
  const int32_t row_id = __reduce_min_sync(kFullWarp, largest == of_row ? best_id : INT32_MAX);
  floor = __reduce_max_sync(kFullWarp, floor);
  is_complete = __all_sync(kFullWarp, is_complete) != 0;
  return {value_of_bits(of_row), value_of_bits(floor), row_id, is_complete};
}

// Of the row; every thread gets it.
__device__ Peak find_peak(const PieceSummary* pieces, int count, FinishMemory& memory) {
  if (threadIdx.x < kWarpSize) {
    const Peak peak = peak_of(pieces, count);
    if (threadIdx.x == 0) memory.peak = peak;
  }
  __syncthreads();
  return memory.peak;
}

constexpr int kIncomplete = -2;

// By the scan's logits; kUnusableRow or kIncomplete where there is no token.
__device__ int pick_token(const SampleParams& params, const ScannedRow& row, FinishMemory& memory) {
  const int count = num_pieces(params.vocab_size);
  const Peak peak = find_peak(row.pieces, count, memory);
  if (isnan(peak.largest)) return kUnusableRow;
  if (peak.largest == infinity()) return kIncomplete;
  if (peak.largest == -infinity()) return 0;
  if (row.kind == ScanKind::kGreedy) return peak.best_id;
  if (!peak.is_complete) return kIncomplete;
  int token = -1;
  if (row.kind == ScanKind::kFew) {
    if (!(fabsf(peak.largest / row.sampling.temperature) < infinity())) return kIncomplete;
    token = FewRow(row.pieces, count, row.sampling, peak.largest, peak.floor, memory.few).draw(row.kv_len);
  } else {
    if (!(peak.largest * mass_scale(row.sampling.temperature) > -kMaxPower / 2)) return kIncomplete;
    token = MassRow(params, row, peak.largest, memory.mass).draw();
  }
  return token < 0 ? kIncomplete : token;
}

// Whether the row has its result now.
__device__ bool finish_row(const SampleParams& params, const ScannedRow& row, FinishMemory& memory) {
  if (row.row == kDummyRow) {
    clear_alternatives(params, row.index);
    if (threadIdx.x == 0) params.results[row.index] = ResultRow{};
    return true;
  }
  if (row.kind == ScanKind::kNone) return false;
  const int token = pick_token(params, row, memory);
  if (token == kIncomplete) return false;
  const bool is_reported = row.has_logprobs && token != kUnusableRow;
  if (is_reported && !gather_logprobs(row, num_pieces(params.vocab_size), memory.logprobs)) return false;
  clear_alternatives(params, row.index);
  ResultRow result{row.row, 0, 0.0f, 0, 0, 0};
  if (is_reported) {
    __syncthreads();  // alternatives are cleared before they are written
    report_logprobs(params, row, token, memory.logprobs, result);
  }
  write_result(params, row.index, row.kv_len, token, result);
  return true;
}

// A plain row, by one warp: what can be read early is, nothing meets after the scan. Its pieces always suffice.
__device__ void finish_plain(const SampleParams& params, const ScannedRow& row) {
  clear_alternatives(params, row.index);
  if (threadIdx.x >= kWarpSize) return wait_for_previous_kernel();
  const RowEnd end(params, row.row, row.kv_len);
  wait_for_previous_kernel();
  const Peak peak = peak_of(row.pieces, num_pieces(params.vocab_size));
  const int token = isnan(peak.largest) ? kUnusableRow : peak.largest == -infinity() ? 0 : peak.best_id;
  write_result(params, row.index, end, token, {row.row, 0, 0.0f, 0, 0, 0});
  if (threadIdx.x == 0) ScanSpace(params).is_done[row.index] = 1;
}

// Brings near the ids that a token will be compared with.
__device__ __forceinline__ void touch_stop_ids(const SampleParams& params, const ScannedRow& row) {
  const auto lane = static_cast<int>(threadIdx.x);
  if (lane >= kWarpSize || lane >= row.sampling.num_stop_ids) return;
  const int32_t* stop_ids = params.mirror.stop_ids + static_cast<int64_t>(row.row) * kMaxStopIds;
  asm volatile("" ::"r"(stop_ids[lane]));
}

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ SampleParams params) {
  __shared__ FinishMemory memory;
  allow_next_kernel();
  // The scan's blocks have seen the end of the kernels before it: what those wrote can be read early.
  const ScannedRow row(params, static_cast<int>(blockIdx.x));
  if (row.is_plain) return finish_plain(params, row);
  touch_stop_ids(params, row);
  wait_for_previous_kernel();
  const bool is_done = finish_row(params, row, memory);
  if (threadIdx.x == 0) ScanSpace(params).is_done[row.index] = is_done ? 1 : 0;
}

}  // namespace

void launch_sample_finish(const SampleParams& params, cudaStream_t stream) {
  launch_chained(kOp, finish_kernel, dim3(static_cast<unsigned>(params.num_sampled)), kFinishThreads, stream, params);
}

}  // namespace headway::cuda
