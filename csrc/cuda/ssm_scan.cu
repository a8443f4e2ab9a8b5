// Mamba-2 scan over ragged rows: chooses among the kernels of ssm_scan.h.
#include "cuda/common/check.h"
#include "cuda/ops.h"
#include "cuda/ssm_scan.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "ssm_scan";

// Of the kernels on tensor cores the chunked one knows states in float16.
void scan_half_states(const SsmScanParams& params, cudaStream_t stream) {
  const bool is_short = params.num_tokens <= kMaxRecurrentTokens ||
                        (params.max_query_len > 0 && params.max_query_len <= kMaxRecurrentTokens);
  if (is_short || !can_scan_chunks(params)) return launch_recurrent_scan(params, stream);
  launch_chunked_scan(params, stream);
}

}  // namespace

void ssm_scan(const SsmScanParams& params, Stream stream) {
  if (params.rows.num_rows == 0) return;
  require(params.num_tokens <= INT32_MAX, kOp, "num_tokens is too large for one launch");
  require(params.num_groups > 0 && params.num_heads % params.num_groups == 0, kOp, "num_groups must divide num_heads");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.state_dtype == DType::kFloat16) return scan_half_states(params, cuda_stream);
  const bool has_bound = params.max_query_len > 0 && params.max_query_len < params.num_tokens;
  const int64_t max_row_tokens = has_bound ? params.max_query_len : params.num_tokens;
  if (max_row_tokens <= kMaxRecurrentTokens) return launch_recurrent_scan(params, cuda_stream);
  if (can_scan_warpgroups(params)) return launch_warpgroup_scan(params, cuda_stream);
  if (can_scan_chunks(params)) return launch_chunked_scan(params, cuda_stream);
  launch_recurrent_scan(params, cuda_stream);
}

}  // namespace headway::cuda
