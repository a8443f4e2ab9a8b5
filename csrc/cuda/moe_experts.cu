// The experts of a small batch, in two launches: in-projection with the activation, then out-projection with the sum
// over each token's experts. Both read the weights of the experts the step touches once, and little else.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/device.h"
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
constexpr int kMaxOutFragments = 2;
constexpr int kMaxTokens = 256;
constexpr int kMaxPairs = 8192;
constexpr int kFewTokens = 64;  // up to here, experts rarely get more than 8 pairs
constexpr int kWantedBlocks = 512;
constexpr int kResidentInBlocks = 2;  // of the in-projection, on a multiprocessor
constexpr int kMaxStaticSharedBytes = 28 * 1024;  // of an out-projection's block

template <int kTokenTiles>
constexpr int kTiledTokens = kTokenTiles == 1 ? kFewTokens : kMaxTokens;

// Sums of the warps, for one item: [warp][row][pair].
template <int kFragments, int kTokenTiles>
struct Partials {
  static constexpr int kRows = kFragments * kFragmentRows;
  static constexpr int kPairs = 8 * kTokenTiles;
  static constexpr int kTurns =
      kTokenTiles == 1 ? 2 : 1;  // with two, an item's are read while the next one's are written
  float values[kTurns][kMoeWarps][kRows][kPairs + 1];

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

// Pairs of one expert whose products are made together.
struct ItemPairs {
  const uint16_t* pairs;
  int count;
};

// What a thread of the out-projection adds: one channel of one pair.
struct Term {
  bool is_valid;
  float weight;
  float* sum;
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

// Runs the block's items. All threads call prepare(item) while the item's copies are under way, and finish(turn, item,
// what prepare returned) once the warps' sums are there.
template <typename Stream, int kFragments, int kTokenTiles, typename Prepare, typename Finish>
__device__ void run_items(Stream& stream, const PairTable& table, int first_rank, int rank_step,
                          Partials<kFragments, kTokenTiles>& partials, Prepare prepare, Finish finish) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  constexpr int kItemPairs = 8 * kTokenTiles;
  constexpr int kTurns = Partials<kFragments, kTokenTiles>::kTurns;
  int turn = 0;
  for (int rank = first_rank; rank < *table.num_touched; rank += rank_step) {
    const int expert = table.touched[rank];
    const int num_pairs = table.count(expert);
    for (int first = 0; first < num_pairs; first += kItemPairs) {
      const ItemPairs item{table.pairs + table.first[expert] + first, min(kItemPairs, num_pairs - first)};
      const auto prepared = prepare(item);
      float sums[kFragments][kTokenTiles][4] = {};
      stream.multiply(sums);
      if (kTurns == 1) __syncthreads();  // the last item's have been read
      partials.store(turn, warp, lane, sums);
      __syncthreads();
      finish(turn, item, prepared);
      turn = (turn + 1) % kTurns;
    }
  }
}

// A block makes tile_features features of its experts: at most 16 with their gates, or 32.
template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kMoeThreads)
    in_kernel(const __grid_constant__ MoeExpertsParams params, int tile_features) {
  extern __shared__ __align__(16) unsigned char queues[];
  __shared__ Partials<kInFragments, kTokenTiles> partials;
  const PairTable table(queues + kMoeWarps * kMoeHalfQueueBytes, params.num_experts);
  wait_for_previous_kernel();
  allow_next_kernel();  // not before: the out-projection takes it that the routing is there when it starts
  build_pairs(table, params.expert_ids, static_cast<int>(params.num_tokens) * params.top_k, params.num_experts);

  const int first_feature = static_cast<int>(blockIdx.x) * tile_features;
  const int end_feature = min(first_feature + tile_features, params.width);
  const int num_features = end_feature - first_feature;
  const int gates = params.is_gated ? params.width : 0;
  const int second = params.is_gated ? gates + first_feature : first_feature + kFragmentRows;
  const ExpertProduct product{params.w_in,
                              int64_t{params.width} + gates,
                              params.hidden,
                              {first_feature, second},
                              {end_feature, gates + end_feature},
                              params.x,
                              params.top_k,
                              params.x_stride};

  auto* inner = static_cast<T*>(params.inner);
  const auto finish = [&](int turn, const ItemPairs& item, int) {
    for (int i = static_cast<int>(threadIdx.x); i < num_features * item.count; i += kMoeThreads) {
      const int row = i % num_features;
      const int place = i / num_features;
      float value = partials.total(turn, row, place);
      value = activate(params.activation, value);
      if (params.is_gated) value *= partials.total(turn, kFragmentRows + row, place);
      inner[static_cast<int64_t>(item.pairs[place]) * params.width + first_feature + row] = from_float<T>(value);
    }
  };
  const auto first_rank = static_cast<int>(blockIdx.y);
  const auto rank_step = static_cast<int>(gridDim.y);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  ExpertStream<T, kInFragments, kTokenTiles, kMoeHalfQueueBytes> stream(product, table, {first_rank, 0}, rank_step,
                                                                        queues + warp * kMoeHalfQueueBytes, warp,
                                                                        static_cast<int>(threadIdx.x) % kWarpSize);
  stream.start_inputs();
  run_items(stream, table, first_rank, rank_step, partials, [](const ItemPairs&) { return 0; }, finish);
}

// A block makes tile_channels channels of all tokens: at most 16 kFragments, the rest of the last fragment is not read.
template <typename T, int kFragments, int kTokenTiles, int kQueueBytes>
__global__ void __launch_bounds__(kMoeThreads)
    out_kernel(const __grid_constant__ MoeExpertsParams params, int tile_channels) {
  constexpr int kRows = kFragments * kFragmentRows;
  extern __shared__ __align__(16) unsigned char queues[];
  __shared__ Partials<kFragments, kTokenTiles> partials;
  __shared__ float sums[kTiledTokens<kTokenTiles>][kRows];
  const int num_tokens = static_cast<int>(params.num_tokens);
  const int thread = static_cast<int>(threadIdx.x);
  const PairTable table(queues + kMoeWarps * kQueueBytes, params.num_experts);
  for (int i = thread; i < num_tokens * kRows; i += kMoeThreads) sums[i / kRows][i % kRows] = 0;
  build_pairs(table, params.expert_ids, num_tokens * params.top_k, params.num_experts);

  const int first_channel = static_cast<int>(blockIdx.x) * tile_channels;
  const int end_channel = min(first_channel + tile_channels, params.hidden);
  const ExpertProduct product{params.w_out,
                              params.hidden,
                              params.width,
                              {first_channel, first_channel + kFragmentRows},
                              {end_channel, end_channel},
                              params.inner,
                              1,
                              params.width};
  const int row = thread % kRows;
  const int place = thread / kRows;
  static_assert(kRows * 8 * kTokenTiles <= kMoeThreads);
  const auto prepare = [&](const ItemPairs& item) {
    if (place >= item.count) return Term{false, 0.0f, nullptr};
    const int pair = item.pairs[place];
    return Term{true, params.weights[pair], &sums[pair / params.top_k][row]};
  };
  const auto finish = [&](int turn, const ItemPairs&, const Term& term) {
    if (term.is_valid) *term.sum = fmaf(term.weight, partials.total(turn, row, place), *term.sum);
  };
  const int warp = thread / kWarpSize;
  ExpertStream<T, kFragments, kTokenTiles, kQueueBytes> stream(product, table, {0, 0}, 1, queues + warp * kQueueBytes,
                                                               warp, thread % kWarpSize);
  wait_for_previous_kernel();  // the weights did not depend on it
  allow_next_kernel();
  stream.start_inputs();
  run_items(stream, table, 0, 1, partials, prepare, finish);
  __syncthreads();

  auto* out = static_cast<T*>(params.out);
  const int num_channels = end_channel - first_channel;
  for (int i = thread; i < num_tokens * num_channels; i += kMoeThreads) {
    const int token = i / num_channels;
    const int row = i % num_channels;
    out[static_cast<int64_t>(token) * params.hidden + first_channel + row] = from_float<T>(sums[token][row]);
  }
}

int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

int shared_bytes(const MoeExpertsParams& params, int queue_bytes) {
  return static_cast<int>(kMoeWarps * queue_bytes +
                          PairTable::bytes(params.num_experts, params.num_tokens * params.top_k));
}

// Features are dealt out so that the blocks just fill the multiprocessors, some times over.
template <typename T, int kTokenTiles>
void launch_in(const MoeExpertsParams& params, cudaStream_t stream) {
  const int most_features = params.is_gated ? kFragmentRows : kInFragments * kFragmentRows;
  const int fewest_tiles = divide_up(params.width, most_features);
  const int64_t max_touched = std::min<int64_t>(params.num_experts, params.num_tokens * params.top_k);
  const auto num_parts = static_cast<int>(std::clamp<int64_t>(kWantedBlocks / fewest_tiles, 1, max_touched));
  const int wave_blocks = kResidentInBlocks * device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  const int num_waves = divide_up(fewest_tiles * num_parts, wave_blocks);
  const int tile_features = divide_up(params.width, num_waves * wave_blocks / num_parts);
  const dim3 grid(static_cast<unsigned>(divide_up(params.width, tile_features)), static_cast<unsigned>(num_parts));
  launch_chained_wide(kOp, in_kernel<T, kTokenTiles>, grid, kMoeThreads, shared_bytes(params, kMoeHalfQueueBytes),
                      stream, params, tile_features);
}

template <typename T, int kFragments, int kTokenTiles, int kQueueBytes>
void launch_out(const MoeExpertsParams& params, int tile_channels, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((params.hidden + tile_channels - 1) / tile_channels));
  launch_chained_wide(kOp, out_kernel<T, kFragments, kTokenTiles, kQueueBytes>, grid, kMoeThreads,
                      shared_bytes(params, kQueueBytes), stream, params, tile_channels);
}

// Channels are dealt out evenly to one block a multiprocessor, whose queues have its shared memory to themselves.
template <typename T>
void launch_few(const MoeExpertsParams& params, cudaStream_t stream) {
  launch_in<T, 1>(params, stream);
  const int most_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kOp);
  if (shared_bytes(params, kMoeWholeQueueBytes) + kMaxStaticSharedBytes > most_bytes) {
    return launch_out<T, 1, 1, kMoeHalfQueueBytes>(params, kFragmentRows, stream);
  }
  const int num_multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  const int wave_channels = num_multiprocessors * kMaxOutFragments * kFragmentRows;
  const int num_blocks = num_multiprocessors * ((params.hidden + wave_channels - 1) / wave_channels);
  const int tile_channels = (params.hidden + num_blocks - 1) / num_blocks;
  if (tile_channels <= kFragmentRows) {
    launch_out<T, 1, 1, kMoeWholeQueueBytes>(params, tile_channels, stream);
  } else {
    launch_out<T, 2, 1, kMoeWholeQueueBytes>(params, tile_channels, stream);
  }
}

template <typename T>
void launch_many(const MoeExpertsParams& params, cudaStream_t stream) {
  launch_in<T, 2>(params, stream);
  launch_out<T, 1, 2, kMoeHalfQueueBytes>(params, kFragmentRows, stream);
}

template <typename T>
void launch_dtype(const MoeExpertsParams& params, cudaStream_t stream) {
  const bool is_aligned = is_vectorisable<T>(params.x, params.x_stride, params.hidden) &&
                          is_vectorisable<T>(params.w_in, params.hidden, params.width) &&
                          is_vectorisable<T>(params.w_out, params.width, params.hidden) &&
                          is_vectorisable<T>(params.inner, params.width, params.width);
  require(is_aligned, kOp, "hidden, width and x's stride must be multiples of 8, pointers 16-byte aligned");
  if (params.num_tokens <= kFewTokens) {
    launch_few<T>(params, stream);
  } else {
    launch_many<T>(params, stream);
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
