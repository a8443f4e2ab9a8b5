// The scan of sample_scan.cuh: a block reads one piece, edits it, and leaves its summary (sample_piece.cuh).
#include <cuda_runtime_api.h>

#include "cuda/common/chained.cuh"
#include "cuda/sample_piece.cuh"
#include "cuda/sample_scan.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "sample";
constexpr int kScanBlocks = 4;  // a multiprocessor

struct ScanMemory {
  union {
    PieceMemory piece;
    EditTable table;
  };
  int32_t num_edits;
  uint32_t is_edited[kPieceLogits / 32];  // bits
};

// Leaves the edits too where the row's end looks at the logits again. Not inlined, on a copy of the logits: rows
// without edits keep theirs in registers.
__device__ __noinline__ void edit_piece(const SampleParams& params, int index, int begin, int size, ScanMemory& memory,
                                        PieceLogits& logits, EditSummary& summary) {
  static_assert(kPieceLogits / 32 == kScanThreads);
  const ScannedRow row(params, index);
  const auto thread = static_cast<int>(threadIdx.x);
  const bool is_listed = row.kind == ScanKind::kMass && is_cut(row.sampling);
  memory.is_edited[thread] = 0;
  if (thread == 0) memory.num_edits = 0;
  const auto place = [&](int i) { return logits.place(i); };
  const auto list = [&](int id, float value) {
    if (!is_listed) return;
    const int count = atomicAdd(&memory.num_edits, 1);
    if (count < kPieceEdits) summary.edits[count] = {value, id};
    atomicOr(&memory.is_edited[(id - begin) / 32], 1u << (id - begin) % 32);
  };
  edit_values<kPieceCount>(logits.values, place, params.mirror, row.row, row.kv_len, begin, size, memory.table, list);
  if (!is_listed) return;
  summary.is_edited[thread] = memory.is_edited[thread];
  if (thread == 0) summary.num_edits = memory.num_edits <= kPieceEdits ? memory.num_edits : -1;
}

__global__ void __launch_bounds__(kScanThreads, kScanBlocks) scan_kernel(const __grid_constant__ SampleParams params) {
  __shared__ ScanMemory memory;
  wait_for_previous_kernel();
  allow_next_kernel();  // not before: the next one reads early what those before this one wrote (sample_finish.cu)
  const int begin = static_cast<int>(blockIdx.x) * kPieceLogits;
  const int size = min(kPieceLogits, params.vocab_size - begin);
  const auto index = static_cast<int>(blockIdx.y);
  PieceLogits logits;  // loaded before it is known whether the row wants it
  logits.load(params.logits + index * params.logits_stride + begin, size);
  const ScannedRow row(params, index);
  if (row.kind == ScanKind::kNone) return;
  PieceSummary& summary = row.pieces[blockIdx.x];
  Candidate best = best_of_block(logits, begin, 0, memory.piece);
  if (!(best.logit < infinity())) {
    best.logit = __int_as_float(0x7fc00000);
  } else {
    if (row.has_logprobs) leave_raw(logits, best, row.num_alternatives, begin, memory.piece, summary.raw);
    if (row.is_edited) {
      PieceLogits edited = logits;
      edit_piece(params, index, begin, size, memory, edited, summary.edits);
      logits = edited;
      best = best_of_block(logits, begin, 1, memory.piece);
    }
  }
  summarise_piece(logits, best, row, begin, memory.piece, summary);
}

}  // namespace

void launch_sample_scan(const SampleParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(num_pieces(params.vocab_size)), static_cast<unsigned>(params.num_sampled));
  launch_chained(kOp, scan_kernel, grid, kScanThreads, stream, params);
}

}  // namespace headway::cuda
