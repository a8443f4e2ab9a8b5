// Attention for rows of many queries (prompt chunks): a block takes up to 128 packed rows (queries x heads that share a
// key head) and walks over all keys they see, 64 at a time, with keys, values and compute overlapped through cp.async.
// Tiles begin at multiples of 64 positions and are folded in order; see attention.h for what that guarantees.
#include "cuda/attention_prefill.cuh"
#include "cuda/common/device.h"
#include "cuda/common/dtype.cuh"

namespace headway::cuda {
namespace {

// 16-row fragments of a warp: two share each load of keys and values where their sums fit the registers.
template <int kDim>
inline constexpr int kFragments = kDim <= 128 ? 2 : 1;
template <int kDim>
inline constexpr int kBlockRows = kAttentionWarps * kFragments<kDim> * kFragmentRows;

// A block's shared memory, as addresses and pointers.
template <int kDim>
struct TileMemory {
  static constexpr int kQueryBytes = kBlockRows<kDim> * TileRows<kDim>::kStrideBytes;
  static constexpr int kKeyBytes = kTileKeys * TileRows<kDim>::kStrideBytes;
  static constexpr int kOffsetBytes = 2 * kTileKeys * 8;
  static constexpr int kBytes = kQueryBytes + 2 * kKeyBytes + kOffsetBytes;

  uint32_t queries;  // [kBlockRows, kDim]
  uint32_t keys;  // [kTileKeys, kDim]
  uint32_t values;
  int64_t* offsets;  // [2, kTileKeys] of the keys of the tile under way and of the next, in elements; -1 = none
  int32_t* prefix;  // [R + 1]

  __device__ explicit TileMemory(unsigned char* base)
      : queries(shared_address(base)),
        keys(queries + kQueryBytes),
        values(keys + kKeyBytes),
        offsets(reinterpret_cast<int64_t*>(base + kQueryBytes + 2 * kKeyBytes)),
        prefix(reinterpret_cast<int32_t*>(base + kBytes)) {}
};

template <typename T, int kDim>
__device__ void copy_queries(const PrefillParams& params, const QueryBlock& block, const TileMemory<kDim>& memory) {
  using Rows = TileRows<kDim>;
  const auto* q = static_cast<const T*>(params.attention.q);
  for (int i = static_cast<int>(threadIdx.x); i < kBlockRows<kDim> * Rows::kPieces; i += kAttentionThreads) {
    const int row = i / Rows::kPieces;
    const int piece = i % Rows::kPieces;
    const int packed = block.first + row;
    const bool is_valid = packed < block.num_packed && piece * 8 < params.attention.head_dim;
    const T* source = is_valid ? q + packed_offset(params, block, packed, params.attention.q_stride) + piece * 8 : q;
    copy_async(Rows::piece(memory.queries, row, piece), source, is_valid);
  }
}

// Where the keys of the tile at key `tile` lie, for the copies that follow the next barrier.
__device__ __forceinline__ void find_keys(const PrefillParams& params, const QueryBlock& block, int tile,
                                          int64_t* offsets) {
  if (threadIdx.x >= kTileKeys) return;
  const KvCache& cache = params.attention.cache;
  const int key = tile + static_cast<int>(threadIdx.x);
  int64_t offset = -1;
  if (key < block.num_keys) {
    const int head_dim = params.attention.head_dim;
    const int64_t token_stride = static_cast<int64_t>(params.attention.num_kv_heads) * head_dim;
    const int64_t physical = block.row.blocks[key / cache.block_size];
    offset = physical * cache.block_stride + key % cache.block_size * token_stride +
             static_cast<int64_t>(block.kv_head) * head_dim;
  }
  offsets[threadIdx.x] = offset;
}

template <typename T, int kDim>
__device__ void copy_tile(const PrefillParams& params, const void* cache, const int64_t* offsets, uint32_t target) {
  using Rows = TileRows<kDim>;
  const auto* base = static_cast<const T*>(cache);
#pragma unroll
  for (int i = 0; i < kTileKeys * Rows::kPieces / kAttentionThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kAttentionThreads;
    const int row = index / Rows::kPieces;
    const int piece = index % Rows::kPieces;
    const int64_t offset = offsets[row];
    const bool is_valid = offset >= 0 && piece * 8 < params.attention.head_dim;
    copy_async(Rows::piece(target, row, piece), is_valid ? base + offset + piece * 8 : base, is_valid);
  }
}

// A warp's fragments: sums, softmax state, and the keys each of a lane's rows sees (0 beyond the last row).
template <int kDim>
struct WarpRows {
  float sums[kFragments<kDim>][kDim / 8][4];
  SoftmaxState state[kFragments<kDim>];
  int limit[kFragments<kDim>][2];
  int fewest_keys;  // that any row of the warp sees
  int most_keys;

  __device__ void reset() {
#pragma unroll
    for (int f = 0; f < kFragments<kDim>; ++f) {
      state[f] = SoftmaxState{};
#pragma unroll
      for (auto& sum : sums[f]) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
    }
  }
};

template <int kDim>
__device__ void place_rows(const PrefillParams& params, const QueryBlock& block, int warp, int lane,
                           WarpRows<kDim>& rows) {
  const int first = block.first + warp * kFragments<kDim> * kFragmentRows;
  const int last = min(first + kFragments<kDim> * kFragmentRows, block.num_packed) - 1;
  rows.fewest_keys = keys_seen(params, block, first);
  rows.most_keys = first < block.num_packed ? keys_seen(params, block, last) : 0;
#pragma unroll
  for (int f = 0; f < kFragments<kDim>; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int packed = first + f * kFragmentRows + lane / 4 + 8 * half;
      const bool is_valid = packed < block.num_packed;
      rows.limit[f][half] = is_valid ? keys_seen(params, block, packed) : 0;
    }
  }
}

template <typename T, int kDim>
__device__ void score_tile(float (&scores)[kFragments<kDim>][kScoreTiles][4], const TileMemory<kDim>& memory, int warp,
                           int lane) {
  const int quarter = lane / 8;
  const int first_row = warp * kFragments<kDim> * kFragmentRows + quarter % 2 * 8 + lane % 8;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t query[kFragments<kDim>][4];
#pragma unroll
    for (int f = 0; f < kFragments<kDim>; ++f) {
      load_matrices(query[f],
                    TileRows<kDim>::piece(memory.queries, first_row + f * kFragmentRows, 2 * step + quarter / 2));
    }
#pragma unroll
    for (int j = 0; j < kTileKeys / 16; ++j) {
      uint32_t b[4];
      load_matrices(b, TileRows<kDim>::piece(memory.keys, 16 * j + quarter / 2 * 8 + lane % 8, 2 * step + quarter % 2));
#pragma unroll
      for (int f = 0; f < kFragments<kDim>; ++f) {
        multiply_add<T>(scores[f][2 * j], query[f], b[0], b[1]);
        multiply_add<T>(scores[f][2 * j + 1], query[f], b[2], b[3]);
      }
    }
  }
}

template <typename T, int kDim>
__device__ void add_values(WarpRows<kDim>& rows, const float (&scores)[kFragments<kDim>][kScoreTiles][4],
                           const TileMemory<kDim>& memory, int lane) {
#pragma unroll
  for (int j = 0; j < kTileKeys / 16; ++j) {
    uint32_t probabilities[kFragments<kDim>][4];
#pragma unroll
    for (int f = 0; f < kFragments<kDim>; ++f) {
      pack_probabilities<T>(probabilities[f], scores[f][2 * j], scores[f][2 * j + 1]);
    }
#pragma unroll
    for (int pair = 0; pair < kDim / 16; ++pair) {
      uint32_t b[4];
      load_values<kDim>(b, memory.values + 16 * j * TileRows<kDim>::kStrideBytes, pair, lane);
#pragma unroll
      for (int f = 0; f < kFragments<kDim>; ++f) {
        multiply_add<T>(rows.sums[f][2 * pair], probabilities[f], b[0], b[1]);
        multiply_add<T>(rows.sums[f][2 * pair + 1], probabilities[f], b[2], b[3]);
      }
    }
  }
}

template <int kDim>
__device__ void mask_tile(float (&scores)[kFragments<kDim>][kScoreTiles][4], const WarpRows<kDim>& rows, int tile,
                          int lane) {
#pragma unroll
  for (int f = 0; f < kFragments<kDim>; ++f) {
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      const int key = tile + 8 * n + 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key + i % 2 >= rows.limit[f][i / 2]) scores[f][n][i] = minus_infinity();
      }
    }
  }
}

template <typename T, int kDim>
__device__ void write_rows(const PrefillParams& params, const QueryBlock& block, const WarpRows<kDim>& rows, int warp,
                           int lane) {
  const int64_t stride = static_cast<int64_t>(params.attention.num_heads) * params.attention.head_dim;
  auto* out = static_cast<T*>(params.attention.out);
#pragma unroll
  for (int f = 0; f < kFragments<kDim>; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (rows.limit[f][half] == 0) continue;
      const int packed = block.first + (warp * kFragments<kDim> + f) * kFragmentRows + lane / 4 + 8 * half;
      const float factor = reciprocal_of(rows.state[f].sum[half]);
      T* target = out + packed_offset(params, block, packed, stride);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int channel = 8 * n + 2 * (lane % 4);
        if (channel >= params.attention.head_dim) continue;
        *reinterpret_cast<uint32_t*>(target + channel) = pack_pair<T>(__fmul_rn(rows.sums[f][n][2 * half], factor),
                                                                      __fmul_rn(rows.sums[f][n][2 * half + 1], factor));
      }
    }
  }
}

// All keys of one block of queries. While the scores are computed the values arrive; while the values are used, the
// next keys do.
template <typename T, int kDim>
__device__ void attend_block(const PrefillParams& params, const QueryBlock& block, const TileMemory<kDim>& memory) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const KvCache& cache = params.attention.cache;
  const int num_key_tiles = (block.num_keys + kTileKeys - 1) / kTileKeys;
  WarpRows<kDim> rows;
  place_rows(params, block, warp, lane, rows);
  rows.reset();

  __syncthreads();  // the last block's reads are over
  find_keys(params, block, 0, memory.offsets);
  copy_queries<T, kDim>(params, block, memory);
  __syncthreads();
  copy_tile<T, kDim>(params, cache.keys, memory.offsets, memory.keys);
  commit_copies();
  for (int n = 0; n < num_key_tiles; ++n) {
    const int tile = n * kTileKeys;
    int64_t* offsets = memory.offsets + n % 2 * kTileKeys;
    int64_t* next_offsets = memory.offsets + (n + 1) % 2 * kTileKeys;
    const bool is_seen = tile < rows.most_keys;

    wait_copies<0>();
    __syncthreads();  // these keys are there; the last tile's values have been read
    copy_tile<T, kDim>(params, cache.values, offsets, memory.values);
    commit_copies();
    find_keys(params, block, tile + kTileKeys, next_offsets);
    float scores[kFragments<kDim>][kScoreTiles][4] = {};
    if (is_seen) {
      score_tile<T, kDim>(scores, memory, warp, lane);
      if (tile + kTileKeys > rows.fewest_keys) mask_tile<kDim>(scores, rows, tile, lane);
    }

    wait_copies<0>();
    __syncthreads();  // the values are there; these keys have been read
    if (n + 1 < num_key_tiles) copy_tile<T, kDim>(params, cache.keys, next_offsets, memory.keys);
    commit_copies();
    if (is_seen) {
#pragma unroll
      for (int f = 0; f < kFragments<kDim>; ++f) {
        float factor[2];
        softmax_tile(scores[f], rows.state[f], factor, params.log2_scale);
        scale_rows(rows.sums[f], factor);
      }
      add_values<T, kDim>(rows, scores, memory, lane);
    }
  }
#pragma unroll
  for (int f = 0; f < kFragments<kDim>; ++f) finish_sums(rows.state[f]);
  write_rows<T, kDim>(params, block, rows, warp, lane);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads) tiled_kernel(const __grid_constant__ PrefillParams params) {
  extern __shared__ __align__(16) unsigned char shared[];
  const TileMemory<kDim> memory(shared);
  prefix_rows(memory.prefix, params.attention.rows.num_rows,
              [&](int r) { return num_query_blocks<kBlockRows<kDim>>(params, r); });
  const QueryBlocks<kBlockRows<kDim>> blocks{params, memory.prefix};
  const int64_t num_blocks = blocks.count();

  // From the most keys to the fewest, every other round of the grid backwards.
  for (int64_t round = 0; round * gridDim.x < num_blocks; ++round) {
    const int64_t place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int64_t index = round * gridDim.x + place;
    if (index < num_blocks) attend_block<T, kDim>(params, blocks.at(index), memory);
  }
}

template <typename T, int kDim>
void launch(const PrefillParams& params, cudaStream_t stream) {
  const PagedAttentionParams& attention = params.attention;
  const int num_multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, kAttentionOp);
  const int64_t blocks = max_query_blocks<kBlockRows<kDim>>(params);
  const int64_t resident = std::min(kAttentionBlocks, 2 * num_multiprocessors);
  const auto num_blocks = static_cast<unsigned>(std::min(resident, blocks * attention.num_kv_heads));
  const int shared_bytes = TileMemory<kDim>::kBytes + (attention.rows.num_rows + 1) * 4;
  auto* kernel = tiled_kernel<T, kDim>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), kAttentionOp);
  kernel<<<num_blocks, kAttentionThreads, shared_bytes, stream>>>(params);
  check_launch(kAttentionOp);
}

template <typename T>
void launch_dtype(const PrefillParams& params, cudaStream_t stream) {
  switch (padded_head_dim(params.attention.head_dim)) {
    case 32:
      return launch<T, 32>(params, stream);
    case 64:
      return launch<T, 64>(params, stream);
    case 80:
      return launch<T, 80>(params, stream);
    case 96:
      return launch<T, 96>(params, stream);
    case 128:
      return launch<T, 128>(params, stream);
    case 192:
      return launch<T, 192>(params, stream);
    default:
      return launch<T, 256>(params, stream);
  }
}

}  // namespace

void launch_tiled_attention(const PagedAttentionParams& attention, cudaStream_t stream) {
  const PrefillParams params{attention, attention.num_heads / attention.num_kv_heads, attention.scale * kLog2E};
  if (attention.dtype == DType::kBFloat16) {
    launch_dtype<__nv_bfloat16>(params, stream);
  } else {
    launch_dtype<__half>(params, stream);
  }
}

}  // namespace headway::cuda
