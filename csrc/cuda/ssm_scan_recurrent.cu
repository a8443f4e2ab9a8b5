// ssm_scan token by token, for decode rows, short rows and fp32 models. A block owns some state rows of one head of one
// row of the step and touches no other block's data, so in-place slots need no ordering.
#include "cuda/common/dtype.cuh"
#include "cuda/ops.h"
#include "cuda/ssm_recurrence.cuh"
#include "cuda/ssm_scan.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "ssm_scan";

template <typename T, int kN, bool kIsExact, typename State>
__global__ void __launch_bounds__(kMaxScanWarps* kWarpSize)
    recurrent_scan_kernel(SsmScanParams params, int slices, bool skips_chunked) {
  __shared__ ScanTile<kN> tile;
  // Block -> (row, head, slice of the head's state rows).
  const int slice = static_cast<int>(blockIdx.x) % slices;
  const int head = static_cast<int>(blockIdx.x) / slices % params.num_heads;
  const int row = static_cast<int>(blockIdx.x) / slices / params.num_heads;
  if (skips_chunked) {
    const int num_tokens = params.rows.query_start[row + 1] - params.rows.query_start[row];
    if (num_chunked_tokens(params.rows.row_start[row], num_tokens) > 0) return;
  }
  const int slice_rows = static_cast<int>(blockDim.x) / kWarpSize * ScanLayout<kN>::kWarpRows;
  const int first_p = slice * slice_rows;
  const RecurrentSpan span = recurrent_span<State>(params, row);
  scan_recurrently<T, kN, kIsExact, State>(params, span, head, first_p, min(slice_rows, params.head_dim - first_p),
                                           tile);
}

template <typename T, int kN, bool kIsExact, typename State>
void launch(const SsmScanParams& params, bool skips_chunked, cudaStream_t stream) {
  using L = ScanLayout<kN>;
  // As many warps a block as a head has state rows for; single warps when that leaves the chip empty.
  const int64_t num_heads = static_cast<int64_t>(params.rows.num_rows) * params.num_heads;
  const int head_warps = (params.head_dim + L::kWarpRows - 1) / L::kWarpRows;
  const int warps = num_heads < 256 ? 1 : (head_warps < kMaxScanWarps ? head_warps : kMaxScanWarps);
  const int slices = (head_warps + warps - 1) / warps;
  require(num_heads * slices <= INT32_MAX, kOp, "num_rows * num_heads is too large for one launch");
  recurrent_scan_kernel<T, kN, kIsExact, State>
      <<<static_cast<unsigned>(num_heads * slices), warps * kWarpSize, 0, stream>>>(params, slices, skips_chunked);
  check_launch(kOp);
}

template <typename T, typename State>
void launch_state_size(const SsmScanParams& params, bool skips_chunked, cudaStream_t stream) {
  const int state_size = params.state_size;
  const bool is_aligned = is_vectorisable<State>(params.state, params.state_stride, state_size);
  if (is_aligned && state_size == 16) return launch<T, 16, true, State>(params, skips_chunked, stream);
  if (is_aligned && state_size == 32) return launch<T, 32, true, State>(params, skips_chunked, stream);
  if (is_aligned && state_size == 64) return launch<T, 64, true, State>(params, skips_chunked, stream);
  if (is_aligned && state_size == 128) return launch<T, 128, true, State>(params, skips_chunked, stream);
  if (is_aligned && state_size == 256) return launch<T, 256, true, State>(params, skips_chunked, stream);
  if (state_size <= 64) return launch<T, 64, false, State>(params, skips_chunked, stream);
  if (state_size <= 256) return launch<T, 256, false, State>(params, skips_chunked, stream);
  require(false, kOp, "state_size is " + std::to_string(state_size) + "; the limit is 256");
}

void launch_dtype(const SsmScanParams& params, bool skips_chunked, cudaStream_t stream) {
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    dispatch_state(params.state_dtype, kOp, [&](auto state) {
      launch_state_size<T, typename decltype(state)::Type>(params, skips_chunked, stream);
    });
  });
}

}  // namespace

void launch_recurrent_scan(const SsmScanParams& params, cudaStream_t stream) {
  launch_dtype(params, false, stream);
}

void launch_short_rows_scan(const SsmScanParams& params, cudaStream_t stream) {
  launch_dtype(params, true, stream);
}

}  // namespace headway::cuda
