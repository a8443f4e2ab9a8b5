// The experts of a small batch, in two launches: in-projection with the activation, then out-projection with the sum
// over each token's experts. Both read the weights of the experts the step touches once, and little else.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/device.h"
#include "cuda/common/divide.h"
#include "cuda/common/dtype.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/moe_activate.cuh"
#include "cuda/moe_stream.cuh"
#include "cuda/moe_warpgroup.h"
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

// What a thread of the out-projection adds: one channel of one pair.
struct Term {
  bool is_valid;
  float weight;
  float* sum;
};

// Runs the block's items, all pairs of each. All threads call prepare(chunk) while the chunk's copies are under way,
// and finish(turn, tile, chunk, what prepare returned) once the warps' sums are there.
template <typename Stream, int kFragments, int kTokenTiles, typename Prepare, typename Finish>
__device__ void run_items(Stream& stream, const PairTable& table, int num_tiles, MoeItems items,
                          Partials<kFragments, kTokenTiles>& partials, Prepare prepare, Finish finish) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  constexpr int kTurns = Partials<kFragments, kTokenTiles>::kTurns;
  const MoeItem step(items.step, num_tiles);
  int turn = 0;
  for (MoeItem item(items.first, num_tiles); item.rank < *table.num_touched; item.advance(step, num_tiles)) {
    const ExpertPairs all = table.touched[item.rank];
    for (int begin = 0; begin < all.count; begin += Stream::kItemPairs) {
      const ExpertPairs chunk = all.chunk(begin, Stream::kItemPairs);
      const auto prepared = prepare(chunk);
      float sums[kFragments][kTokenTiles][4] = {};
      stream.multiply(sums);
      if (kTurns == 1) __syncthreads();  // the last chunk's have been read
      partials.store(turn, warp, lane, sums);
      __syncthreads();
      finish(turn, item.tile, chunk, prepared);
      turn = (turn + 1) % kTurns;
    }
  }
}

// Tiles have tile_features features: at most 16 with their gates, or 32.
template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kMoeThreads)
    in_kernel(const __grid_constant__ MoeExpertsParams params, int num_tiles, int tile_features) {
  extern __shared__ __align__(16) unsigned char queues[];
  __shared__ Partials<kInFragments, kTokenTiles> partials;
  const int num_pairs = static_cast<int>(params.num_tokens) * params.top_k;
  const PairTable table(queues + kMoeWarps * kMoeHalfQueueBytes, params.num_experts, num_pairs);
  wait_for_previous_kernel();
  allow_next_kernel();  // not before: the out-projection takes it that the routing is there when it starts
  build_pairs(table, params.expert_ids, num_pairs, params.num_experts);

  const int gates = params.is_gated ? params.width : 0;
  const ExpertProduct product{
      params.w_in,    int64_t{params.width} + gates,           params.hidden, num_tiles, tile_features,
      params.width,   params.is_gated ? gates : kFragmentRows, gates,         params.x,  params.top_k,
      params.x_stride};

  auto* inner = static_cast<T*>(params.inner);
  const auto finish = [&](int turn, int tile, const ExpertPairs& chunk, int) {
    const int first_feature = tile * tile_features;
    const int num_features = min(tile_features, params.width - first_feature);
    for (int i = static_cast<int>(threadIdx.x); i < num_features * chunk.count; i += kMoeThreads) {
      const int row = i % num_features;
      const int place = i / num_features;
      float value = partials.total(turn, row, place);
      value = activate(params.activation, value);
      if (params.is_gated) value *= partials.total(turn, kFragmentRows + row, place);
      const int64_t pair = table.pairs[chunk.first + place];
      inner[pair * params.width + first_feature + row] = from_float<T>(value);
    }
  };
  const MoeItems items{static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  ExpertStream<T, kInFragments, kTokenTiles, kMoeHalfQueueBytes> stream(
      product, table, items, queues + warp * kMoeHalfQueueBytes, warp, static_cast<int>(threadIdx.x) % kWarpSize);
  stream.start_inputs();
  run_items(stream, table, num_tiles, items, partials, [](const ExpertPairs&) { return 0; }, finish);
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
  const int num_pairs = num_tokens * params.top_k;
  const int thread = static_cast<int>(threadIdx.x);
  const PairTable table(queues + kMoeWarps * kQueueBytes, params.num_experts, num_pairs);
  for (int i = thread; i < num_tokens * kRows; i += kMoeThreads) sums[i / kRows][i % kRows] = 0;
  build_pairs(table, params.expert_ids, num_pairs, params.num_experts);

  const auto num_tiles = static_cast<int>(gridDim.x);
  const MoeItems items{static_cast<int>(blockIdx.x), num_tiles};
  const ExpertProduct product{params.w_out,  params.hidden,
                              params.width,  num_tiles,
                              tile_channels, params.hidden,
                              kFragmentRows, 0,
                              params.inner,  1,
                              params.width};
  const int row = thread % kRows;
  const int place = thread / kRows;
  static_assert(kRows * 8 * kTokenTiles <= kMoeThreads);
  const auto prepare = [&](const ExpertPairs& chunk) {
    if (place >= chunk.count) return Term{false, 0.0f, nullptr};
    const int pair = table.pairs[chunk.first + place];
    return Term{true, params.weights[pair], &sums[pair / params.top_k][row]};
  };
  const auto finish = [&](int turn, int, const ExpertPairs&, const Term& term) {
    if (term.is_valid) *term.sum = fmaf(term.weight, partials.total(turn, row, place), *term.sum);
  };
  const int warp = thread / kWarpSize;
  ExpertStream<T, kFragments, kTokenTiles, kQueueBytes> stream(product, table, items, queues + warp * kQueueBytes, warp,
                                                               thread % kWarpSize);
  wait_for_previous_kernel();  // the weights did not depend on it
  allow_next_kernel();
  stream.start_inputs();
  run_items(stream, table, num_tiles, items, partials, prepare, finish);
  __syncthreads();
  const int first_channel = static_cast<int>(blockIdx.x) * tile_channels;
  const int end_channel = min(first_channel + tile_channels, params.hidden);

  auto* out = static_cast<T*>(params.out);
  const int num_channels = end_channel - first_channel;
  for (int i = thread; i < num_tokens * num_channels; i += kMoeThreads) {
    const int token = i / num_channels;
    const int row = i % num_channels;
    out[static_cast<int64_t>(token) * params.hidden + first_channel + row] = from_float<T>(sums[token][row]);
  }
}

int shared_bytes(const MoeExpertsParams& params, int queue_bytes) {
  const int64_t num_pairs = params.num_tokens * params.top_k;
  return static_cast<int>(kMoeWarps * queue_bytes + PairTable::bytes(params.num_experts, num_pairs));
}

// Rows of a tile for which the block with most tiles has least to do, each tile's own cost included.
int choose_tile_rows(int num_rows, int most_rows, int64_t num_matrices, int num_blocks) {
  constexpr int kOwnCostRows = 2;
  int best_rows = most_rows;
  int64_t best_cost = INT64_MAX;
  for (int rows = most_rows; rows >= most_rows / 2; --rows) {
    const int64_t num_items = num_matrices * divide_up(num_rows, rows);
    const int64_t cost = (num_items + num_blocks - 1) / num_blocks * (rows + kOwnCostRows);
    if (cost < best_cost) {
      best_cost = cost;
      best_rows = rows;
    }
  }
  return best_rows;
}

template <typename T, int kTokenTiles>
void launch_in(const MoeExpertsParams& params, cudaStream_t stream) {
  const int most_features = params.is_gated ? kFragmentRows : kInFragments * kFragmentRows;
  const int64_t most_touched = std::min<int64_t>(params.num_experts, params.num_tokens * params.top_k);
  const int most_blocks = kResidentInBlocks * device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  const int tile_features = choose_tile_rows(params.width, most_features, most_touched, most_blocks);
  const int num_tiles = divide_up(params.width, tile_features);
  const auto num_blocks = static_cast<unsigned>(std::clamp<int64_t>(num_tiles * most_touched, 1, most_blocks));
  launch_chained_wide(kOp, in_kernel<T, kTokenTiles>, dim3(num_blocks), kMoeThreads,
                      shared_bytes(params, kMoeHalfQueueBytes), stream, params, num_tiles, tile_features);
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
  const bool has_warpgroups = params.results != nullptr && has_warpgroup_experts();
  require(has_warpgroups || params.num_tokens <= kMaxTokens, kOp, "at most 256 tokens");
  require(params.num_tokens * params.top_k <= kMaxPairs, kOp, "at most 8192 pairs of token and expert");
  require(params.num_experts <= kMaxMoeExperts, kOp, "at most 1024 experts");
  if (has_warpgroups) return launch_warpgroup_experts(params, static_cast<cudaStream_t>(stream));
  dispatch_half(params.dtype, kOp, [&](auto dtype) {
    launch_dtype<typename decltype(dtype)::Type>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace headway::cuda
