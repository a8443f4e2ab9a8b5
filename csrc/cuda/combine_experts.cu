// The end of the experts of many tokens: combine_experts.cuh with results that lie in the experts' order.
#include "cuda/combine_experts.cuh"
#include "cuda/ops.h"

namespace headway::cuda {

void combine_experts(const CombineExpertsParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.hidden == 0) return;
  require(params.num_tokens <= INT32_MAX, kCombineExpertsOp, "num_tokens is too large for one launch");
  dispatch_dtype(params.dtype, kCombineExpertsOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_combine<T, T>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace headway::cuda
