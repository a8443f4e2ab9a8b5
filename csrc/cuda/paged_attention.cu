// Chooses among the attention kernels: stream or decode (rows of few queries), warpgroup or tiled (rows of many) or
// generic (fp32, odd sizes). The device tells rows apart; here only what the host's bounds exclude is left out.
#include "cuda/attention.h"
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

// Everything 16 bytes at a time, through tensor cores.
bool takes_tensor_cores(const PagedAttentionParams& params) {
  if (params.dtype == DType::kFloat32 || params.head_dim > 256 || !(params.scale > 0.0f)) return false;
  using Element = __nv_bfloat16;  // any 16-bit type
  return is_vectorisable<Element>(params.q, params.q_stride, params.head_dim) &&
         is_vectorisable<Element>(params.cache.keys, params.cache.block_stride, params.head_dim) &&
         is_vectorisable<Element>(params.cache.values, params.cache.block_stride, params.head_dim) &&
         is_vectorisable<Element>(params.out, 0, params.head_dim);
}

constexpr int64_t kCounterBytes = 16;  // of the blocks that the warpgroup kernel has given out, behind the partials

// Enough for either decode kernel: the cache's blocks are not known here.
int64_t partials_bytes(const PagedAttentionParams& params) {
  return std::max(plan_decode(params).workspace_bytes(), plan_stream(params).workspace_bytes());
}

}  // namespace

int64_t paged_attention_workspace_bytes(const PagedAttentionParams& params) {
  if (params.num_tokens == 0 || padded_head_dim(params.head_dim) == 0) return 0;
  const int64_t counter_bytes = params.max_query_len > kMaxDecodeQueries ? kCounterBytes : 0;
  return partials_bytes(params) + counter_bytes;
}

void paged_attention(const PagedAttentionParams& params, Stream stream) {
  if (params.num_tokens == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (!takes_tensor_cores(params)) return launch_generic_attention(params, cuda_stream);
  require(params.rows.num_rows <= kMaxAttentionRows, kAttentionOp, "a step may have at most 8192 rows");
  require(params.workspace_bytes >= paged_attention_workspace_bytes(params), kAttentionOp,
          "the workspace is smaller than paged_attention_workspace_bytes");
  const bool takes_warpgroups = can_attend_warpgroups(params);
  if (takes_warpgroups && params.head_dim == kStreamDim) {
    launch_stream_attention(params, cuda_stream);
  } else {
    launch_decode_attention(params, cuda_stream);
  }
  if (params.max_query_len <= kMaxDecodeQueries) return;
  if (!takes_warpgroups) return launch_tiled_attention(params, cuda_stream);
  auto* counter = static_cast<unsigned char*>(params.workspace) + partials_bytes(params);
  launch_warpgroup_attention(params, reinterpret_cast<unsigned*>(counter), cuda_stream);
}

}  // namespace headway::cuda
