// The decode step over slot windows in one launch, for rows so few that time is latency: launches, and trips to memory
// that wait for each other. A cluster of blocks has one row's channels of one group, a warp 16 of them. Every block
// convolves the group's B and C for itself; what a group shares at the end, the outputs that the norm runs over, goes
// through the cluster's shared memory. Each number is made by the operations, in the order, of the three launches for
// many rows (mamba_decode_inputs.cu, mamba_decode_state.cu, gated_rms_norm.cu), so that a row's bits do not depend on
// how many there are.
#include "cuda/common/chained.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/device.h"
#include "cuda/common/mbarrier.cuh"
#include "cuda/gated_norm.cuh"
#include "cuda/mamba_decode_conv.cuh"
#include "cuda/state_window.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "mamba_decode";

// A cluster at most: with more, a block's threads would be too few for the norm.
template <typename T>
constexpr int kMaxBlocks = sizeof(T) == 4 ? 8 : 16;

// A block at most: by the registers of their states and the shared memory of their inputs.
template <typename T, int kN>
constexpr int kMaxWarps = kN > 128 || sizeof(T) == 4 ? 8 : 16;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // which has clusters

// What a block's warps hand to each other. Entries count from the token's canonical base.
template <typename T, int kN>
struct BlockMemory {
  static constexpr int kMaxChannels = kMaxWarps<T, kN> * kTileChannels;
  alignas(16) T B[kMaxWindow * kN];  // until the inputs are scored; then of a stretch to fold
  alignas(16) T C[kN];
  alignas(16) T x[kMaxWindow * kMaxChannels];
  alignas(16) T y[kMaxBlocks<T> * kMaxChannels];       // of the whole group, likewise the next two
  alignas(16) T z[kMaxBlocks<T> * kMaxChannels];
  alignas(16) T weight[kMaxBlocks<T> * kMaxChannels];
  alignas(16) float table[kMaxWarps<T, kN>][kTableWidth];  // of the block's heads, likewise below
  float dt[kMaxWarps<T, kN>][kMaxWindow];
  float A[kMaxWarps<T, kN>];
  float D[kMaxWarps<T, kN>];
  float scores[kMaxWindow];
  float sums[kWarpSize];
  alignas(8) uint64_t has_outputs;  // a barrier
};

// A block's share of a row's one token.
struct BlockShare {
  SlotRow row;
  StateChannels channels;  // the warp's
  int first_channel;       // the block's
  int num_channels;
  int first_head;
  int num_heads;
  int rank;  // in the cluster, whose first writes what a group shares
  int num_blocks;
  int base;     // canonical
  int num_old;  // inputs in the log from there on

  __device__ __forceinline__ BlockShare(const MambaDecodeParams& params, const RowTiles& tiles, int cluster_blocks)
      : row(params, static_cast<int>(blockIdx.y)) {
    const int num_warps = static_cast<int>(blockDim.x / kWarpSize);
    const int tile = static_cast<int>(blockIdx.x) * num_warps;
    channels = tiles.channels(row.slot, tile + static_cast<int>(threadIdx.x / kWarpSize));
    first_channel = tile * kTileChannels;
    num_channels = num_warps * kTileChannels;
    first_head = tiles.of_head.divide(tile);
    num_heads = tiles.of_head.divide(tile + num_warps - 1) - first_head + 1;
    num_blocks = cluster_blocks;
    rank = rank_in_cluster();
    base = row.canonical(row.start);
    num_old = row.start - base;
  }
};

// Starts copying what the token's inputs since the base have left in the log, and what its norm takes.
template <typename T, int kN>
__device__ __forceinline__ void copy_inputs(const MambaDecodeParams& params, const BlockShare& share,
                                            const LogWalk<T>& log, BlockMemory<T, kN>& memory) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr unsigned kPieces = kN / kWidth;
  const int64_t group_channel = inner_channels(params) + static_cast<int64_t>(share.channels.group) * kN;
#pragma unroll 1
  for (unsigned index = threadIdx.x; index < share.num_old * kPieces; index += blockDim.x) {
    const unsigned n = index % kPieces * kWidth;
    const T* source = log.at(static_cast<int>(index / kPieces)) + group_channel + n;
    copy_async(shared_address(memory.B + index / kPieces * kN + n), source, true);
  }
  // A warp its own channels of x.
  constexpr unsigned kTilePieces = kTileChannels / kWidth;
#pragma unroll 1
  for (unsigned index = lane_index(); index < share.num_old * kTilePieces; index += kWarpSize) {
    const unsigned offset = share.channels.first + index % kTilePieces * kWidth;
    T* target = memory.x + index / kTilePieces * share.num_channels + offset - share.first_channel;
    copy_async(shared_address(target), log.at(static_cast<int>(index / kTilePieces)) + offset, true);
  }
  const int offset = static_cast<int>(threadIdx.x) * kWidth;
  if (offset < params.norm_group_size) {
    const int64_t channel = static_cast<int64_t>(share.channels.group) * params.norm_group_size + offset;
    const T* z = static_cast<const T*>(params.z) + share.row.token * params.token_stride;
    copy_async(shared_address(memory.z + offset), z + channel, true);
    copy_async(shared_address(memory.weight + offset), static_cast<const T*>(params.norm_weight) + channel, true);
  }
  commit_copies();
}

// B, C and the block's x.
template <typename T, int kN>
__device__ __forceinline__ void convolve(const MambaDecodeParams& params, const BlockShare& share,
                                         const LogWalk<T>& log, BlockMemory<T, kN>& memory) {
  constexpr int kPieces = kN / kPieceWidth;
  const int num_pieces = 2 * kPieces + share.num_channels / kPieceWidth;
  const int start_entry =
      static_cast<int>(static_cast<unsigned>(share.row.start) % static_cast<unsigned>(params.log.num_raw));
  const int piece = static_cast<int>(threadIdx.x);
  if (piece >= num_pieces) return;
  const bool is_x = piece >= 2 * kPieces;
  const bool is_c = !is_x && piece >= kPieces;
  const int n = piece % kPieces * kPieceWidth;
  const int p = (piece - 2 * kPieces) * kPieceWidth;
  const int64_t state =
      inner_channels(params) + (is_c ? group_states(params) : 0) + static_cast<int64_t>(share.channels.group) * kN + n;
  const int64_t channel = is_x ? share.first_channel + p : state;
  T* target = is_x   ? memory.x + share.num_old * share.num_channels + p
              : is_c ? memory.C + n
                     : memory.B + share.num_old * kN + n;
  const bool is_kept = is_x || share.rank == 0;
  const Filter<T> filter(params, channel);
  const Piece<T> out = PieceStep<T>{params, share.row, channel, is_kept, start_entry}.run_one(filter);
  out.store(target);
  if (is_kept && !is_c) out.store(log.at(share.num_old) + channel);
}

// Step sizes of the block's heads, the token's to the log, and their constants.
template <typename T, int kN>
__device__ __forceinline__ void stage_steps(const MambaDecodeParams& params, const BlockShare& share,
                                            const LogWalk<T>& log, BlockMemory<T, kN>& memory) {
#pragma unroll 1
  for (unsigned index = blockDim.x - 1 - threadIdx.x; index < static_cast<unsigned>(share.num_heads * kMaxWindow);
       index += blockDim.x) {  // from the last on: the first ones convolve
    const int entry = static_cast<int>(index % kMaxWindow);
    const int head = share.first_head + static_cast<int>(index / kMaxWindow);
    if (entry > share.num_old) continue;
    T* kept = log_dt<T>(params, share.row.slot, static_cast<int>(log.entry(entry)), head);
    const T* brought = static_cast<const T*>(params.dt) + share.row.token * params.token_stride + head;
    const bool is_new = entry == share.num_old;
    const T raw = *(is_new ? brought : kept);
    if (is_new) {
      *kept = raw;
      memory.A[index / kMaxWindow] = params.A[head];
      memory.D[index / kMaxWindow] = params.D[head];
    }
    memory.dt[index / kMaxWindow][entry] = step_size(params, raw, params.dt_bias[head]);
  }
}

template <typename T, int kN>
__device__ __forceinline__ void score_inputs(const BlockShare& share, BlockMemory<T, kN>& memory) {
  const int num_warps = static_cast<int>(blockDim.x / kWarpSize);
#pragma unroll 4
  for (int entry = static_cast<int>(threadIdx.x / kWarpSize); entry < kMaxWindow; entry += num_warps) {
    const float score = warp_dot<kN>(memory.B + entry * kN, memory.C);  // nobody uses those beyond the token
    if (lane_index() == 0) memory.scores[entry] = score;
  }
}

// Half a warp a head: a warp's heads are at most two, of which the second may be none.
template <typename T, int kN>
struct HeadWeights {
  int index;
  int count;
  bool is_head;
  Stretch stretch;

  __device__ __forceinline__ HeadWeights(const BlockShare& share, const BlockMemory<T, kN>& memory)
      : index(static_cast<int>(threadIdx.x / kMaxWindow)),
        count(share.num_old + 1),
        is_head(index < share.num_heads),
        stretch(is_head && lane() < count ? memory.dt[index][lane()] : 0.0f, count, is_head ? memory.A[index] : 0.0f) {}

  __device__ __forceinline__ void store(BlockMemory<T, kN>& memory) const {
    if (is_head) store_weights(stretch, count, memory.scores[lane()], memory.D[index], memory.table[index]);
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kMaxWindow); }
};

// The warp's outputs, to every block of the cluster: a half-warp each to every other one.
template <typename T, int kN>
__device__ __forceinline__ void share_outputs(const BlockShare& share, float y, BlockMemory<T, kN>& memory) {
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
__device__ __forceinline__ void normalise(const MambaDecodeParams& params, const BlockShare& share,
                                          BlockMemory<T, kN>& memory) {
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
  store_normalised(out, reinterpret_cast<const NormPiece<T>*>(memory.weight)[thread], values, scale);
}

template <typename T, int kN, typename State>
__global__ void __launch_bounds__(kMaxWarps<T, kN>* kWarpSize, 1)
    decode_fused_kernel(MambaDecodeParams params, RowTiles tiles, int cluster_blocks) {
  __shared__ BlockMemory<T, kN> memory;
  const Barrier has_outputs{shared_address(&memory.has_outputs)};
  const BlockShare share(params, tiles, cluster_blocks);
  const SlotRow& row = share.row;
  State* slot_state = static_cast<State*>(params.ssm_state) + row.slot * params.ssm_state_stride +
                      static_cast<int64_t>(share.channels.first) * kN;
  const bool has_state = row.base > 0 && !row.is_padding();
  // The launch before may be this one for the row's token before: only what cannot be stale goes ahead of it.
  if (has_state && lane_index() == 0) prefetch_bytes(slot_state, kTileChannels * kN * static_cast<int>(sizeof(State)));
  if (threadIdx.x == 0) {
    has_outputs.init(1);
    Barrier::publish_inits();
    has_outputs.arrive_expecting(static_cast<uint32_t>(share.num_blocks * share.num_channels * sizeof(T)));
  }
  arrive_in_cluster();
  wait_for_previous_kernel();
  allow_next_kernel();
  if (row.is_padding()) {
    T* out = static_cast<T*>(params.out) + row.token * inner_channels(params) + share.first_channel;
    if (row.num_tokens > 0 && static_cast<int>(threadIdx.x) < share.num_channels)
      out[threadIdx.x] = from_float<T>(0.0f);
    return;
  }
  if (row.num_tokens == 0) return;

  StateTile<kN> state;
  TileLoad<State, kN> load;
  load.begin(state, slot_state, has_state);
  const LogWalk<T> log(params, row.slot, share.base, 0);
  copy_inputs(params, share, log, memory);
  convolve(params, share, log, memory);
  stage_steps(params, share, log, memory);
  wait_copies<0>();
  __syncthreads();
  const HeadWeights<T, kN> weights_of(share, memory);
  score_inputs(share, memory);
  __syncthreads();
  weights_of.store(memory);
  load.end(state);
  for (int base = row.base; base < share.base;) {
    const int end = window_end(base);
    __syncthreads();  // the stretch before is folded
    StretchFold<T, kN>(params, share.channels, base, end - base, memory.B).apply(state);
    base = end;
    round_state_at<State>(state, share.channels, base);
    if (base == row.next_base) state.store(slot_state);
  }
  __syncthreads();

  LaneQuery<T, kN> query;
  query.load(memory.C);
  const int channel = share.channels.first - share.first_channel;
  const LaneInputs<T> inputs(share.num_old + 1, StagedInputs<T>{memory.x + channel, share.num_channels});
  const float* weights = memory.table[share.channels.head - share.first_head];
  const float y = StateTile<kN>::in_order(read_out(state, query, inputs, weights));
  wait_for_cluster();  // all its barriers are there
  share_outputs(share, y, memory);
  has_outputs.wait(0);
  normalise(params, share, memory);
}

#else

template <typename T, int kN, typename State>
__global__ void decode_fused_kernel(MambaDecodeParams, RowTiles, int) {}  // never launched

#endif

// Blocks of a cluster, one for a group of a row; 0 where one launch cannot be or does not pay. Many small blocks are
// quickest while half the multiprocessors are free; else the fewest, for each convolves its group's B and C, and these
// only while all run at once. Measured on an H200: nano30b's shape at 1, 2, 4 and 8 rows takes 8, 4, 2 and 2 blocks.
// More than 8 only some devices have.
template <typename T, int kN, typename State>
int choose_cluster(int group_tiles, int64_t num_groups) {
  const int num_processors = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  const auto run_at_once = [&](int blocks) {
    return num_groups <=
           max_active_clusters(decode_fused_kernel<T, kN, State>, blocks, group_tiles / blocks * kWarpSize, kOp);
  };
  int fewest = 0;
  for (int blocks = kMaxBlocks<T>; blocks > 1; --blocks) {
    const int warps = group_tiles / blocks;
    const bool can_convolve = (2 * kN + warps * kTileChannels) / kPieceWidth <= warps * kWarpSize;
    if (group_tiles % blocks != 0 || warps > kMaxWarps<T, kN> || !can_convolve) continue;
    const bool is_sure = blocks <= kPortableClusterBlocks;
    if (2 * num_groups * blocks <= num_processors && (is_sure || run_at_once(blocks))) return blocks;
    fewest = blocks;
  }
  return fewest > 0 && num_groups * fewest <= num_processors && run_at_once(fewest) ? fewest : 0;
}

template <typename T>
bool is_norm_aligned(const MambaDecodeParams& params) {
  const int64_t d_inner = static_cast<int64_t>(params.num_heads) * params.head_dim;
  return is_vectorisable<T>(params.z, params.token_stride, params.norm_group_size) &&
         is_vectorisable<T>(params.norm_weight, d_inner, params.norm_group_size) &&
         is_vectorisable<T>(params.out, d_inner, params.norm_group_size);
}

template <typename T, int kN, typename State>
bool launch(const MambaDecodeParams& params, cudaStream_t stream) {
  const RowTiles tiles(params);
  const auto kernel = decode_fused_kernel<T, kN, State>;
  if (!is_compiled_for(kernel, 90, kOp)) return false;
  const int64_t num_groups = static_cast<int64_t>(params.rows.num_rows) * params.num_groups;
  const int cluster = choose_cluster<T, kN, State>(tiles.group_count, num_groups);
  if (cluster == 0) return false;
  const int warps = tiles.group_count / cluster;
  const dim3 grid(static_cast<unsigned>(tiles.count / warps), static_cast<unsigned>(params.rows.num_rows));
  launch_chained_clusters(kOp, kernel, grid, cluster, warps * kWarpSize, 0, stream, params, tiles, cluster);
  return true;
}

}  // namespace

bool launch_decode_fused(const MambaDecodeParams& params, cudaStream_t stream) {
  const int64_t d_inner = static_cast<int64_t>(params.num_heads) * params.head_dim;
  if (params.max_query_len != 1 || params.head_dim % kTileChannels != 0 ||
      static_cast<int64_t>(params.norm_group_size) * params.num_groups != d_inner) {
    return false;
  }
  bool is_launched = false;
  dispatch_mixer(params, kOp, [&](auto tag, auto state_size, auto state) {
    using T = typename decltype(tag)::Type;
    if (!is_norm_aligned<T>(params)) return;
    is_launched = launch<T, decltype(state_size)::value, typename decltype(state)::Type>(params, stream);
  });
  return is_launched;
}

}  // namespace headway::cuda
