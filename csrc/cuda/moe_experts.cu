// The experts of a small batch, in two launches: in-projection with the activation, then out-projection with the sum
// over each token's experts. Both read the weights of the experts the step touches once, and little else.
#include <algorithm>

#include "cuda/common/dtype.cuh"
#include "cuda/common/math.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/moe_stream.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "moe_experts";
constexpr int kFragmentRows = 16;
constexpr int kInFragments = 2;  // 32 rows, or 16 of the gate and 16 of up
constexpr int kOutFragments = 1;
constexpr int kMaxTokens = 256;
constexpr int kMaxPairs = 8192;
constexpr int kFewTokens = 64;  // up to here, experts rarely get more than 8 pairs
constexpr int kWantedBlocks = 512;

// Sums of the warps, for one item: [warp][row][pair].
template <int kFragments, int kTokenTiles>
struct Partials {
  static constexpr int kRows = kFragments * kFragmentRows;
  static constexpr int kPairs = 8 * kTokenTiles;
  float values[2][kMoeWarps][kRows][kPairs + 1];  // two: an item's are read while the next one's are written

  __device__ void store(int turn, int warp, int lane, const float (&sums)[kFragments][kTokenTiles][4]) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = f * kFragmentRows + lane / 4 + i / 2 * 8;
          values[turn][warp][row][8 * n + lane % 4 * 2 + i % 2] = sums[f][n][i];
        }
      }
    }
  }

  __device__ float total(int turn, int row, int pair) const {
    float sum = values[turn][0][row][pair];
#pragma unroll
    for (int warp = 1; warp < kMoeWarps; ++warp) sum += values[turn][warp][row][pair];
    return sum;
  }
};

__device__ __forceinline__ float activate(Activation activation, float value) {
  switch (activation) {
    case Activation::kSilu:
      return silu(value);
    case Activation::kGelu:
      return gelu(value);
    default: {
      const float positive = value < 0.0f ? 0.0f : value;  // NaN stays
      return positive * positive;
    }
  }
}

// Runs the block's items. finish(turn, expert, first pair of the item, its pairs) is called by all threads once the
// warps' sums of the item are there.
template <typename T, int kFragments, int kTokenTiles, typename Finish>
__device__ void run_items(const ExpertProduct& product, const PairTable& table, int first_rank, int rank_step,
                          unsigned char* queues, Partials<kFragments, kTokenTiles>& partials, Finish finish) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  ExpertStream<T, kFragments, kTokenTiles> stream(product, table, {first_rank, 0}, rank_step,
                                                  queues + warp * kMoeQueueBytes, warp, lane);
  constexpr int kItemPairs = 8 * kTokenTiles;
  int turn = 0;
  for (int rank = first_rank; rank < *table.num_touched; rank += rank_step) {
    const int expert = table.touched[rank];
    const int num_pairs = table.count(expert);
    for (int first = 0; first < num_pairs; first += kItemPairs) {
      float sums[kFragments][kTokenTiles][4] = {};
      stream.multiply(sums);
      partials.store(turn, warp, lane, sums);
      __syncthreads();
      finish(turn, expert, first, min(kItemPairs, num_pairs - first));
      turn ^= 1;
    }
  }
}

template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kMoeThreads) in_kernel(const __grid_constant__ MoeExpertsParams params) {
  extern __shared__ __align__(16) unsigned char queues[];
  __shared__ Partials<kInFragments, kTokenTiles> partials;
  const PairTable table(queues + kMoeWarps * kMoeQueueBytes, params.num_experts);
  build_pairs(table, params.expert_ids, static_cast<int>(params.num_tokens) * params.top_k, params.num_experts);

  // Rows of the block: 16 features with their gates, or 32 features.
  const int features = params.is_gated ? kFragmentRows : 2 * kFragmentRows;
  const int first_feature = static_cast<int>(blockIdx.x) * features;
  const int second = params.is_gated ? params.width + first_feature : first_feature + kFragmentRows;
  const int64_t rows = params.is_gated ? 2 * static_cast<int64_t>(params.width) : params.width;
  const ExpertProduct product{
      params.w_in, rows,         params.hidden,  {first_feature, second}, {params.width, static_cast<int>(rows)},
      params.x,    params.top_k, params.x_stride};

  auto* inner = static_cast<T*>(params.inner);
  const auto finish = [&](int turn, int expert, int first, int num_pairs) {
    for (int i = static_cast<int>(threadIdx.x); i < features * num_pairs; i += kMoeThreads) {
      const int row = i % features;
      const int place = i / features;
      if (first_feature + row >= params.width) continue;
      float value = partials.total(turn, row, place);
      value = activate(params.activation, value);
      if (params.is_gated) value *= partials.total(turn, kFragmentRows + row, place);
      const int64_t pair = table.pairs[table.first[expert] + first + place];
      inner[pair * params.width + first_feature + row] = from_float<T>(value);
    }
  };
  run_items<T, kInFragments, kTokenTiles>(product, table, static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y),
                                          queues, partials, finish);
}

template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kMoeThreads) out_kernel(const __grid_constant__ MoeExpertsParams params) {
  extern __shared__ __align__(16) unsigned char queues[];
  __shared__ Partials<kOutFragments, kTokenTiles> partials;
  __shared__ float sums[kMaxTokens][kFragmentRows];
  const int num_tokens = static_cast<int>(params.num_tokens);
  const int thread = static_cast<int>(threadIdx.x);
  const PairTable table(queues + kMoeWarps * kMoeQueueBytes, params.num_experts);
  for (int i = thread; i < num_tokens * kFragmentRows; i += kMoeThreads) sums[i / kFragmentRows][i % kFragmentRows] = 0;
  build_pairs(table, params.expert_ids, num_tokens * params.top_k, params.num_experts);

  const int first_channel = static_cast<int>(blockIdx.x) * kFragmentRows;
  const ExpertProduct product{
      params.w_out, params.hidden, params.width, {first_channel, 0}, {params.hidden, 0}, params.inner, 1, params.width};
  const auto finish = [&](int turn, int expert, int first, int num_pairs) {
    for (int i = thread; i < kFragmentRows * num_pairs; i += kMoeThreads) {
      const int row = i % kFragmentRows;
      const int place = i / kFragmentRows;
      const int pair = table.pairs[table.first[expert] + first + place];
      float& sum = sums[pair / params.top_k][row];
      sum = fmaf(params.weights[pair], partials.total(turn, row, place), sum);
    }
  };
  run_items<T, kOutFragments, kTokenTiles>(product, table, 0, 1, queues, partials, finish);
  __syncthreads();

  auto* out = static_cast<T*>(params.out);
  for (int i = thread; i < num_tokens * kFragmentRows; i += kMoeThreads) {
    const int token = i / kFragmentRows;
    const int channel = first_channel + i % kFragmentRows;
    if (channel >= params.hidden) continue;
    out[static_cast<int64_t>(token) * params.hidden + channel] = from_float<T>(sums[token][i % kFragmentRows]);
  }
}

template <typename T, int kTokenTiles>
void launch(const MoeExpertsParams& params, cudaStream_t stream) {
  const int64_t num_pairs = params.num_tokens * params.top_k;
  const auto shared_bytes =
      static_cast<int>(kMoeWarps * kMoeQueueBytes + PairTable::bytes(params.num_experts, num_pairs));
  auto* in = in_kernel<T, kTokenTiles>;
  auto* out = out_kernel<T, kTokenTiles>;
  check(cudaFuncSetAttribute(in, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), kOp);
  check(cudaFuncSetAttribute(out, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), kOp);

  const int features = params.is_gated ? kFragmentRows : 2 * kFragmentRows;
  const int num_tiles = (params.width + features - 1) / features;
  const int64_t max_touched = std::min<int64_t>(params.num_experts, num_pairs);
  const int64_t num_parts = std::clamp<int64_t>(kWantedBlocks / num_tiles, 1, max_touched);
  const dim3 grid(static_cast<unsigned>(num_tiles), static_cast<unsigned>(num_parts));
  in<<<grid, kMoeThreads, shared_bytes, stream>>>(params);
  check_launch(kOp);
  const auto num_blocks = static_cast<unsigned>((params.hidden + kFragmentRows - 1) / kFragmentRows);
  out<<<num_blocks, kMoeThreads, shared_bytes, stream>>>(params);
  check_launch(kOp);
}

template <typename T>
void launch_dtype(const MoeExpertsParams& params, cudaStream_t stream) {
  const bool is_aligned = is_vectorisable<T>(params.x, params.x_stride, params.hidden) &&
                          is_vectorisable<T>(params.w_in, params.hidden, params.width) &&
                          is_vectorisable<T>(params.w_out, params.width, params.hidden) &&
                          is_vectorisable<T>(params.inner, params.width, params.width);
  require(is_aligned, kOp, "hidden, width and x's stride must be multiples of 8, pointers 16-byte aligned");
  if (params.num_tokens <= kFewTokens) {
    launch<T, 1>(params, stream);
  } else {
    launch<T, 2>(params, stream);
  }
}

}  // namespace

void moe_experts(const MoeExpertsParams& params, Stream stream) {
  if (params.num_tokens == 0) return;
  require(params.num_tokens <= kMaxTokens, kOp, "at most 256 tokens");
  require(params.num_tokens * params.top_k <= kMaxPairs, kOp, "at most 8192 pairs of token and expert");
  require(params.num_experts <= kMaxMoeExperts, kOp, "at most 1024 experts");
  dispatch_half(params.dtype, kOp, [&](auto dtype) {
    launch_dtype<typename decltype(dtype)::Type>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace headway::cuda
