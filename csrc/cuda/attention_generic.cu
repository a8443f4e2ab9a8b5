// Attention for what the tensor core kernels do not take: fp32, and head dims or strides that are not multiples of 16
// bytes. One block a (token, head), tiles of keys in order from position 0, plain fp32 arithmetic: exact and slow.
#include "cuda/attention.h"
#include "cuda/common/dtype.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/rows.cuh"

namespace headway::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxHeadDim = 512;
constexpr int kThreadChannels = kMaxHeadDim / kThreads;

struct Tile {
  float query[kMaxHeadDim];
  float weights[kTileKeys];    // scores, then their exponentials
  int64_t offsets[kTileKeys];  // of the keys, in elements
  float scratch[kWarpSize];
};

template <typename T>
__device__ void find_keys(const PagedAttentionParams& params, Tile& tile, const int32_t* blocks, int kv_head, int first,
                          int num_keys) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= num_keys) return;
  const KvCache& cache = params.cache;
  const int64_t token_stride = static_cast<int64_t>(params.num_kv_heads) * params.head_dim;
  const int64_t block = blocks[(first + i) / cache.block_size];
  tile.offsets[i] = block * cache.block_stride + (first + i) % cache.block_size * token_stride +
                    static_cast<int64_t>(kv_head) * params.head_dim;
}

template <typename T>
__device__ void score_keys(const PagedAttentionParams& params, Tile& tile, int num_keys) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const auto* keys = static_cast<const T*>(params.cache.keys);
  for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < num_keys; i += kWarps) {
    const T* key = keys + tile.offsets[i];
    float dot = 0.0f;
    for (int d = lane; d < params.head_dim; d += kWarpSize) dot = fmaf(tile.query[d], to_float(key[d]), dot);
    dot = warp_sum(dot);
    if (lane == 0) tile.weights[i] = dot * params.scale;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) generic_kernel(PagedAttentionParams params) {
  __shared__ Tile tile;
  const int thread = static_cast<int>(threadIdx.x);
  const int token = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int r = find_row(params.rows.query_start, params.rows.num_rows, token);
  const int num_keys = params.rows.row_start[r] + token - params.rows.query_start[r] + 1;
  const int32_t* blocks = params.cache.block_table + params.row_ids[r] * params.cache.table_stride;
  const int kv_head = head / (params.num_heads / params.num_kv_heads);
  const T* q = static_cast<const T*>(params.q) + token * params.q_stride + static_cast<int64_t>(head) * params.head_dim;
  for (int d = thread; d < params.head_dim; d += kThreads) tile.query[d] = to_float(q[d]);

  float largest = -__int_as_float(0x7f800000);
  float sum = 0.0f;
  float out[kThreadChannels] = {};
  for (int first = 0; first < num_keys; first += kTileKeys) {
    const int count = min(kTileKeys, num_keys - first);
    find_keys<T>(params, tile, blocks, kv_head, first, count);
    __syncthreads();
    score_keys<T>(params, tile, count);
    __syncthreads();

    // Each thread holds one score of the tile.
    const float score = thread < count ? tile.weights[thread] : -__int_as_float(0x7f800000);
    const float new_largest = fmaxf(largest, block_max(score, tile.scratch));
    const float factor = expf(largest - new_largest);
    const float weight = thread < count ? expf(score - new_largest) : 0.0f;
    __syncthreads();
    if (thread < count) tile.weights[thread] = weight;
    sum = fmaf(sum, factor, block_sum(weight, tile.scratch));
    __syncthreads();
    largest = new_largest;
    const auto* values = static_cast<const T*>(params.cache.values);
#pragma unroll
    for (int i = 0; i < kThreadChannels; ++i) {
      const int d = thread + i * kThreads;
      if (d >= params.head_dim) break;
      float total = out[i] * factor;
      for (int key = 0; key < count; ++key) {
        total = fmaf(tile.weights[key], to_float(values[tile.offsets[key] + d]), total);
      }
      out[i] = total;
    }
    __syncthreads();
  }

  T* target = static_cast<T*>(params.out) + (static_cast<int64_t>(token) * params.num_heads + head) * params.head_dim;
#pragma unroll
  for (int i = 0; i < kThreadChannels; ++i) {
    const int d = thread + i * kThreads;
    if (d < params.head_dim) target[d] = from_float<T>(out[i] / sum);
  }
}

}  // namespace

void launch_generic_attention(const PagedAttentionParams& params, cudaStream_t stream) {
  require(params.head_dim <= kMaxHeadDim, kAttentionOp, "head_dim must be at most 512");
  const dim3 grid(static_cast<unsigned>(params.num_tokens), static_cast<unsigned>(params.num_heads));
  dispatch_dtype(params.dtype, kAttentionOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    generic_kernel<T><<<grid, kThreads, 0, stream>>>(params);
  });
  check_launch(kAttentionOp);
}

}  // namespace headway::cuda
