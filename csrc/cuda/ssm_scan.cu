// Mamba-2 scan over ragged rows: chooses among the kernels of ssm_scan.h.
#include "cuda/common/check.h"
#include "cuda/ops.h"
#include "cuda/ssm_scan.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "ssm_scan";

}  // namespace

void ssm_scan(const SsmScanParams& params, Stream stream) {
  if (params.rows.num_rows == 0) return;
  require(params.num_tokens <= INT32_MAX, kOp, "num_tokens is too large for one launch");
  require(params.num_groups > 0 && params.num_heads % params.num_groups == 0, kOp, "num_groups must divide num_heads");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool has_bound = params.max_query_len > 0 && params.max_query_len < params.num_tokens;
  const int64_t max_row_tokens = has_bound ? params.max_query_len : params.num_tokens;
  if (max_row_tokens <= kMaxRecurrentTokens) return launch_recurrent_scan(params, cuda_stream);
  const bool is_float_state = params.state_dtype == DType::kFloat32;  // of the kernels below the chunked one knows both
  if (is_float_state && can_scan_wide(params)) return launch_wide_scan(params, cuda_stream);
  if (is_float_state && can_scan_warpgroups(params)) return launch_warpgroup_scan(params, cuda_stream);
  if (can_scan_chunks(params)) return launch_chunked_scan(params, cuda_stream);
  launch_recurrent_scan(params, cuda_stream);
}

}  // namespace headway::cuda
