// Chooses each token's experts from given logits, one warp a token.
#include "cuda/ops.h"
#include "cuda/route_choice.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "route";
constexpr int kWarps = 4;

template <int kItems>
__global__ void __launch_bounds__(kWarps* kWarpSize) route_kernel(RouteParams params) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (token >= params.num_tokens) return;
  choose_experts<kItems>(params, params.logits + token * params.num_experts, token, lane);
}

}  // namespace

void route(const RouteParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.top_k == 0) return;
  const auto num_blocks = static_cast<unsigned>((params.num_tokens + kWarps - 1) / kWarps);
  dispatch_experts(params, kOp, [&](auto tag) {
    route_kernel<decltype(tag)::kItems>
        <<<num_blocks, kWarps * kWarpSize, 0, static_cast<cudaStream_t>(stream)>>>(params);
  });
  check_launch(kOp);
}

}  // namespace headway::cuda
