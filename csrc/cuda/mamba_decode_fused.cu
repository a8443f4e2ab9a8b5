// The decode step over slot windows for rows so few that time is latency: launches, and trips to memory that wait for
// each other. Blocks have some of one row's channels of one group, a warp 16 of them, and convolve the group's B and C
// each for itself. What a group shares at the end, the outputs that the norm runs over, goes through shared memory
// where a cluster of blocks can hold the group; else the norm is a launch of its own. Each number is made by the
// operations, in the order, of the launches for many rows (mamba_decode_inputs.cu, mamba_decode_state.cu,
// gated_rms_norm.cu), so that a row's bits do not depend on how many there are.
#include "cuda/common/chained.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/device.h"
#include "cuda/common/mbarrier.cuh"
#include "cuda/gated_norm.cuh"
#include "cuda/mamba_decode_token.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "mamba_decode";
constexpr int kFewestWarps = 4;  // of a block outside clusters

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // which has clusters

// What the norm takes, where it is the cluster's.
template <typename T, int kN>
struct NormMemory {
  static constexpr int kMaxChannels = TokenBlockMemory<T, kN>::kMaxChannels;
  alignas(16) T y[kPortableClusterBlocks * kMaxChannels];  // of the whole group, likewise z
  alignas(16) T z[kPortableClusterBlocks * kMaxChannels];
  alignas(16) T weight[kMaxChannels];
  float sums[kWarpSize];
  alignas(8) uint64_t has_outputs;  // a barrier
};

template <typename T, int kN>
__device__ __forceinline__ void copy_norm_inputs(const MambaDecodeParams& params, const TokenBlock& share,
                                                 NormMemory<T, kN>& memory) {
  const int offset = static_cast<int>(threadIdx.x) * kVectorWidth<T>;
  if (offset < params.norm_group_size) {
    const T* z = static_cast<const T*>(params.z) + share.row.token * params.token_stride +
                 static_cast<int64_t>(share.channels.group) * params.norm_group_size;
    copy_async(shared_address(memory.z + offset), z + offset, true);
  }
  if (offset < share.num_channels) {
    const T* weight = static_cast<const T*>(params.norm_weight) + share.first_channel + offset;
    copy_async(shared_address(memory.weight + offset), weight, true);
  }
  commit_copies();
}

// The warp's outputs, to every block of the cluster: a half-warp each to every other one.
template <typename T, int kN>
__device__ __forceinline__ void share_outputs(const TokenBlock& share, float y, NormMemory<T, kN>& memory) {
  constexpr unsigned kWordLanes = sizeof(uint32_t) / sizeof(T);
  const unsigned lane = lane_index();
  const unsigned channel = lane % kTileChannels;
  uint32_t word = __float_as_uint(y);
  if constexpr (kWordLanes == 2) word = pack_pair<T>(y, __shfl_down_sync(kFullWarp, y, 1));
  if (channel % kWordLanes != 0) return;
  const int offset = share.rank * share.num_channels + share.channels.first - share.first_channel;
  for (int rank = static_cast<int>(lane / kTileChannels); rank < share.num_blocks; rank += 2) {
    store_remote(shared_address(memory.y + offset + channel), word, shared_address(&memory.has_outputs), rank);
  }
}

// The norm over the group, of which a block writes its own channels.
template <typename T, int kN>
__device__ __forceinline__ void normalise(const MambaDecodeParams& params, const TokenBlock& share,
                                          NormMemory<T, kN>& memory) {
  constexpr int kWidth = kVectorWidth<T>;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_pieces = params.norm_group_size / kWidth;
  float values[kWidth] = {};
  float sum = 0.0f;
  if (thread < num_pieces) {
    sum = gate_piece(reinterpret_cast<const NormPiece<T>*>(memory.y)[thread],
                     reinterpret_cast<const NormPiece<T>*>(memory.z)[thread], values, sum);
  }
  const float total = block_reduce<Sum>(sum, 0.0f, memory.sums, (num_pieces + kWarpSize - 1) / kWarpSize);
  const float scale = norm_scale(total, params.norm_group_size, params.norm_eps);
  const int own = thread - share.rank * (share.num_channels / kWidth);
  if (thread >= num_pieces || own < 0 || own >= share.num_channels / kWidth) return;
  T* out = static_cast<T*>(params.out) + share.row.token * inner_channels(params) + share.first_channel + own * kWidth;
  store_normalised(out, reinterpret_cast<const NormPiece<T>*>(memory.weight)[own], values, scale);
}

// Gate and norm of a warp's output y of StateTile::channel(), by the group's cluster.
template <typename T, int kN>
class ClusterNorm {
 public:
  // Tells the cluster that its barrier is there, once.
  __device__ __forceinline__ ClusterNorm(const TokenBlock& share, NormMemory<T, kN>& memory)
      : memory_(memory), has_outputs_{shared_address(&memory.has_outputs)} {
    if (threadIdx.x == 0) {
      has_outputs_.init(1);
      Barrier::publish_inits();
      has_outputs_.arrive_expecting(static_cast<uint32_t>(share.num_blocks * share.num_channels * sizeof(T)));
    }
    arrive_in_cluster();
  }
  __device__ __forceinline__ void run(const MambaDecodeParams& params, const TokenBlock& share, float y) const {
    const float ordered = StateTile<kN>::in_order(y);
    wait_for_cluster();  // all its barriers are there
    share_outputs(share, ordered, memory_);
    has_outputs_.wait(0);
    normalise(params, share, memory_);
  }

 private:
  NormMemory<T, kN>& memory_;
  Barrier has_outputs_;
};

template <typename T, int kN>
__device__ __forceinline__ void clear_outputs(const TokenBlock& share, T* outputs, int64_t stride) {
  T* out = outputs + share.row.token * stride + share.first_channel;
  if (share.row.num_tokens > 0 && static_cast<int>(threadIdx.x) < share.num_channels)
    out[threadIdx.x] = from_float<T>(0.0f);
}

// kNorms: a group's blocks are a cluster. is_sparse: many multiprocessors are free.
template <typename T, int kN, typename State, bool kNorms>
__global__ void __launch_bounds__(kMaxWarps<T, kN>* kWarpSize, 1)
    decode_fused_kernel(MambaDecodeParams params, RowTiles tiles, int group_blocks, bool is_sparse) {
  __shared__ TokenBlockMemory<T, kN> memory;
  const TokenBlock share(params, tiles, group_blocks);
  const SlotRow& row = share.row;
  State* slot_state = static_cast<State*>(params.ssm_state) + row.slot * params.ssm_state_stride +
                      static_cast<int64_t>(share.channels.first) * kN;
  const bool has_state = row.base > 0 && !row.is_padding();
  // The launch before may be this one for the row's token before: only what cannot be stale goes ahead of it. Where
  // blocks fill the device this only takes bandwidth.
  if (is_sparse && has_state && lane_index() == 0) {
    prefetch_bytes(slot_state, kTileChannels * kN * static_cast<int>(sizeof(State)));
  }
  if constexpr (kNorms) {
    __shared__ NormMemory<T, kN> norm_memory;
    const ClusterNorm<T, kN> norm(share, norm_memory);
    wait_for_previous_kernel();
    allow_next_kernel();
    if (row.is_padding()) return clear_outputs<T, kN>(share, static_cast<T*>(params.out), inner_channels(params));
    if (row.num_tokens == 0) return;
    copy_norm_inputs(params, share, norm_memory);
    norm.run(params, share, run_token(params, share, slot_state, has_state, memory));
  } else {
    wait_for_previous_kernel();
    allow_next_kernel();
    T* scanned = static_cast<T*>(params.scanned);
    if (row.is_padding()) return clear_outputs<T, kN>(share, scanned, inner_channels(params));
    if (row.num_tokens == 0) return;
    const float y = run_token(params, share, slot_state, has_state, memory);
    T* out = scanned + row.token * inner_channels(params) + share.channels.first + StateTile<kN>::channel();
    if (StateTile<kN>::is_owner()) *out = from_float<T>(y);
  }
}

#else

template <typename T, int kN, typename State, bool kNorms>
__global__ void decode_fused_kernel(MambaDecodeParams, RowTiles, int, bool) {}  // never launched

#endif

template <typename T, int kN>
bool can_take(int group_tiles, int blocks) {
  const int warps = group_tiles / blocks;
  const bool can_convolve = (2 * kN + warps * kTileChannels) / kPieceWidth <= warps * kWarpSize;
  return group_tiles % blocks == 0 && warps <= kMaxWarps<T, kN> && can_convolve;
}

// Blocks of a cluster, one for a group of a row; 0 where that cannot be or does not pay. Many small blocks are quickest
// while half the multiprocessors are free; else the fewest, for each convolves its group's B and C, and these only
// while all run at once. Measured on an H200: nano30b's shape at 1, 2, 4 and 8 rows takes 8, 4, 2 and 2 blocks.
template <typename T, int kN, typename State>
int choose_cluster(int group_tiles, int64_t num_groups, int num_processors) {
  int fewest = 0;
  for (int blocks = kPortableClusterBlocks; blocks > 1; --blocks) {
    if (!can_take<T, kN>(group_tiles, blocks)) continue;
    if (2 * num_groups * blocks <= num_processors) return blocks;
    fewest = blocks;
  }
  if (fewest == 0 || num_groups * fewest > num_processors) return 0;
  const int num_threads = group_tiles / fewest * kWarpSize;
  const auto kernel = decode_fused_kernel<T, kN, State, true>;
  return num_groups <= max_active_clusters(kernel, fewest, num_threads, kOp) ? fewest : 0;
}

// Blocks for a group of a row without clusters: as many as have a multiprocessor each; 0 where they are too large.
// Measured on an H200: granite_tiny's one row takes 4.1 us in 48 blocks of four warps, 4.6 in 64 of three.
template <typename T, int kN>
int choose_blocks(int group_tiles, int64_t num_groups, int num_processors) {
  for (int64_t blocks = num_processors / num_groups; blocks > 0; --blocks) {
    const int count = static_cast<int>(blocks);
    if (group_tiles >= kFewestWarps * count && can_take<T, kN>(group_tiles, count)) return count;
  }
  return 0;
}

template <typename T>
bool is_norm_aligned(const MambaDecodeParams& params) {
  const int64_t d_inner = static_cast<int64_t>(params.num_heads) * params.head_dim;
  return is_vectorisable<T>(params.z, params.token_stride, params.norm_group_size) &&
         is_vectorisable<T>(params.norm_weight, d_inner, params.norm_group_size) &&
         is_vectorisable<T>(params.out, d_inner, params.norm_group_size);
}

template <typename T, int kN, typename State>
FusedPart launch(const MambaDecodeParams& params, cudaStream_t stream) {
  if (!is_compiled_for(decode_fused_kernel<T, kN, State, true>, 90, kOp)) return FusedPart::kNothing;
  const RowTiles tiles(params);
  const int num_processors = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  const int64_t num_groups = static_cast<int64_t>(params.rows.num_rows) * params.num_groups;
  const auto launch_blocks = [&](auto kernel, int blocks, int cluster) {
    const int warps = tiles.group_count / blocks;
    const dim3 grid(static_cast<unsigned>(tiles.count / warps), static_cast<unsigned>(params.rows.num_rows));
    const bool is_sparse = 2 * num_groups * blocks <= num_processors;
    launch_chained_clusters(kOp, kernel, grid, cluster, warps * kWarpSize, 0, stream, params, tiles, blocks, is_sparse);
  };
  if (const int blocks = choose_cluster<T, kN, State>(tiles.group_count, num_groups, num_processors); blocks > 0) {
    launch_blocks(decode_fused_kernel<T, kN, State, true>, blocks, blocks);
    return FusedPart::kAll;
  }
  if (const int blocks = choose_blocks<T, kN>(tiles.group_count, num_groups, num_processors); blocks > 0) {
    launch_blocks(decode_fused_kernel<T, kN, State, false>, blocks, 1);
    return FusedPart::kScanned;
  }
  return FusedPart::kNothing;
}

}  // namespace

FusedPart launch_decode_fused(const MambaDecodeParams& params, cudaStream_t stream) {
  const int64_t d_inner = static_cast<int64_t>(params.num_heads) * params.head_dim;
  if (params.max_query_len != 1 || params.head_dim % kTileChannels != 0 ||
      static_cast<int64_t>(params.norm_group_size) * params.num_groups != d_inner) {
    return FusedPart::kNothing;
  }
  FusedPart part = FusedPart::kNothing;
  dispatch_mixer(params, kOp, [&](auto tag, auto state_size, auto state) {
    using T = typename decltype(tag)::Type;
    if (!is_norm_aligned<T>(params)) return;
    part = launch<T, decltype(state_size)::value, typename decltype(state)::Type>(params, stream);
  });
  return part;
}

}  // namespace headway::cuda
