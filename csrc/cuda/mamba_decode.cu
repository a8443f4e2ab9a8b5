// A Mamba-2 mixer's decode step over slot windows: one or two launches for few rows (mamba_decode_fused.cu), else three
// chained ones for the new tokens' inputs (mamba_decode_inputs.cu), the state (mamba_decode_state.cu), gate and norm.
#include <algorithm>

#include "cuda/common/vector.cuh"
#include "cuda/mamba_decode.h"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "mamba_decode";
constexpr int kTaps = 4;

template <typename T>
bool is_aligned(const MambaDecodeParams& params) {
  const int64_t d_inner = static_cast<int64_t>(params.num_heads) * params.head_dim;
  const int64_t states = static_cast<int64_t>(params.num_groups) * params.state_size;
  const int64_t conv_dim = d_inner + 2 * states;
  return is_vectorisable<T>(params.columns, params.token_stride, conv_dim) &&
         is_vectorisable<T>(params.conv_weight, conv_dim, conv_dim) &&
         is_vectorisable<T>(params.conv_bias, conv_dim, conv_dim) &&
         is_vectorisable<T>(params.conv_state, params.conv_state_stride, conv_dim) &&
         is_vectorisable<T>(params.log.raw, params.log.raw_stride, conv_dim) &&
         is_vectorisable<T>(params.log.columns, params.log.columns_stride, d_inner + states) &&
         is_vectorisable<T>(params.convolved, conv_dim, conv_dim) &&
         (params.state_dtype == DType::kFloat32
              ? is_vectorisable<float>(params.ssm_state, params.ssm_state_stride, params.state_size)
              : is_vectorisable<__half>(params.ssm_state, params.ssm_state_stride, params.state_size));
}

void require_log(const MambaDecodeParams& params) {
  const StateLogParams& log = params.log;
  require(log.window == kMaxWindow, kOp, "window is " + std::to_string(log.window) + "; expected 16");
  require(params.max_query_len <= kMaxQuery, kOp, "max_query_len exceeds 8");
  require(log.max_rewind >= std::max(1, params.max_query_len - 1), kOp, "max_rewind must cover a row's new tokens");
  require(log.num_entries >= log.window + log.max_rewind + params.max_query_len, kOp,
          "the log must have window + max_rewind + max_query_len entries");
  require(log.num_raw >= log.max_rewind + params.max_query_len + kTaps - 1, kOp,
          "the log must have max_rewind + max_query_len + 3 raw columns");
}

}  // namespace

void mamba_decode(const MambaDecodeParams& params, Stream stream) {
  if (params.rows.num_rows == 0 || params.num_tokens == 0) return;
  require(params.width == kTaps, kOp, "width is " + std::to_string(params.width) + "; expected 4");
  require(params.num_groups > 0 && params.num_heads % params.num_groups == 0, kOp, "num_groups must divide num_heads");
  require_log(params);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    require(is_aligned<T>(params), kOp, "every tensor and its strides must be multiples of 16 bytes");
  });
  const FusedPart part = launch_decode_fused(params, cuda_stream);
  if (part == FusedPart::kAll) return;
  if (part == FusedPart::kNothing) {
    launch_decode_inputs(params, cuda_stream);
    launch_decode_state(params, cuda_stream);
  }
  gated_rms_norm({.num_tokens = params.num_tokens,
                  .hidden = static_cast<int64_t>(params.num_heads) * params.head_dim,
                  .group_size = params.norm_group_size,
                  .y = params.scanned,
                  .z = params.z,
                  .z_stride = params.token_stride,
                  .weight = params.norm_weight,
                  .out = params.out,
                  .eps = params.norm_eps,
                  .dtype = params.dtype},
                 stream);
}

}  // namespace headway::cuda
