// Mamba-2 scan over ragged rows: chooses among the kernels of ssm_scan.h.
#include "cuda/ssm_scan.h"

#include "cuda/common/check.h"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "ssm_scan";

}  // namespace

void ssm_scan(const SsmScanParams& params, Stream stream) {
  if (params.rows.num_rows == 0) return;
  require(params.num_tokens <= INT32_MAX, kOp, "num_tokens is too large for one launch");
  require(params.num_groups > 0 && params.num_heads % params.num_groups == 0, kOp, "num_groups must divide num_heads");
  launch_recurrent_scan(params, static_cast<cudaStream_t>(stream));
}

}  // namespace headway::cuda
