// One token of a row by blocks that make all they need for themselves: a block has some of the channels of one group, a
// warp 16 of them, and convolves the group's B and C as every other block of the group does. Knows nothing of what
// becomes of the outputs. Each number is made by the operations, in the order, of mamba_decode_inputs.cu and
// mamba_decode_state.cu.
#pragma once

#include "cuda/mamba_decode_conv.cuh"
#include "cuda/state_fold.cuh"

namespace headway::cuda {

// A block at most: by the registers of their states and the shared memory of their inputs.
template <typename T, int kN>
inline constexpr int kMaxWarps = kN > 128 || sizeof(T) == 4 ? 8 : 16;

// What a block's warps hand to each other. Entries count from the token's canonical base.
template <typename T, int kN>
struct TokenBlockMemory {
  static constexpr int kMaxChannels = kMaxWarps<T, kN> * kTileChannels;
  FoldMemory<T, kN, kMaxWarps<T, kN>> fold;  // B also of the token's inputs, until they are scored
  alignas(16) T C[kN];
  alignas(16) T x[kMaxWindow * kMaxChannels];
  alignas(16) float table[kMaxWarps<T, kN>][kTableWidth];  // of the block's heads, likewise below
  float dt[kMaxWarps<T, kN>][kMaxWindow];
  float A[kMaxWarps<T, kN>];
  float D[kMaxWarps<T, kN>];
  float scores[kMaxWindow];
};

// A block's share of a row's one token.
struct TokenBlock {
  SlotRow row;
  StateChannels channels;  // the warp's
  int first_channel;  // the block's
  int num_channels;
  int first_head;
  int num_heads;
  int rank;  // among the group's blocks, whose first writes what they share
  int num_blocks;
  int base;  // canonical
  int num_old;  // inputs in the log from there on

  __device__ __forceinline__ TokenBlock(const MambaDecodeParams& params, const RowTiles& tiles, int group_blocks)
      : row(params, static_cast<int>(blockIdx.y)) {
    const int num_warps = static_cast<int>(blockDim.x / kWarpSize);
    const int tile = static_cast<int>(blockIdx.x) * num_warps;
    channels = tiles.channels(row.slot, tile + static_cast<int>(threadIdx.x / kWarpSize));
    first_channel = tile * kTileChannels;
    num_channels = num_warps * kTileChannels;
    first_head = tiles.of_head.divide(tile);
    num_heads = tiles.of_head.divide(tile + num_warps - 1) - first_head + 1;
    num_blocks = group_blocks;
    rank = static_cast<int>(blockIdx.x) % group_blocks;
    base = row.canonical(row.start);
    num_old = row.start - base;
  }
};

// Starts copying what the token's inputs since the base have left in the log.
template <typename T, int kN>
__device__ __forceinline__ void copy_inputs(const MambaDecodeParams& params, const TokenBlock& share,
                                            const LogWalk<T>& log, TokenBlockMemory<T, kN>& memory) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr unsigned kPieces = kN / kWidth;
  const int64_t group_channel = inner_channels(params) + static_cast<int64_t>(share.channels.group) * kN;
#pragma unroll 1
  for (unsigned index = threadIdx.x; index < share.num_old * kPieces; index += blockDim.x) {
    const unsigned n = index % kPieces * kWidth;
    const T* source = log.at(static_cast<int>(index / kPieces)) + group_channel + n;
    copy_async(shared_address(memory.fold.B + index / kPieces * kN + n), source, true);
  }
  // A warp its own channels of x.
  constexpr unsigned kTilePieces = kTileChannels / kWidth;
#pragma unroll 1
  for (unsigned index = lane_index(); index < share.num_old * kTilePieces; index += kWarpSize) {
    const unsigned offset = share.channels.first + index % kTilePieces * kWidth;
    T* target = memory.x + index / kTilePieces * share.num_channels + offset - share.first_channel;
    copy_async(shared_address(target), log.at(static_cast<int>(index / kTilePieces)) + offset, true);
  }
  commit_copies();
}

// B, C and the block's x.
template <typename T, int kN>
__device__ __forceinline__ void convolve(const MambaDecodeParams& params, const TokenBlock& share,
                                         const LogWalk<T>& log, TokenBlockMemory<T, kN>& memory) {
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
                     : memory.fold.B + share.num_old * kN + n;
  const bool is_kept = is_x || share.rank == 0;
  const Filter<T> filter(params, channel);
  const Piece<T> out = PieceStep<T>{params, share.row, channel, is_kept, start_entry}.run_one(filter);
  out.store(target);
  if (is_kept && !is_c) out.store(log.at(share.num_old) + channel);
}

// Step sizes of the block's heads, the token's to the log, and their constants.
template <typename T, int kN>
__device__ __forceinline__ void stage_steps(const MambaDecodeParams& params, const TokenBlock& share,
                                            const LogWalk<T>& log, TokenBlockMemory<T, kN>& memory) {
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
__device__ __forceinline__ void score_inputs(const TokenBlock& share, TokenBlockMemory<T, kN>& memory) {
  const int num_warps = static_cast<int>(blockDim.x / kWarpSize);
#pragma unroll 4
  for (int entry = static_cast<int>(threadIdx.x / kWarpSize); entry < kMaxWindow; entry += num_warps) {
    const float score = warp_dot<kN>(memory.fold.B + entry * kN, memory.C);  // nobody uses those beyond the token
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

  __device__ __forceinline__ HeadWeights(const TokenBlock& share, const TokenBlockMemory<T, kN>& memory)
      : index(static_cast<int>(threadIdx.x / kMaxWindow)),
        count(share.num_old + 1),
        is_head(index < share.num_heads),
        stretch(is_head && lane() < count ? memory.dt[index][lane()] : 0.0f, count, is_head ? memory.A[index] : 0.0f) {}

  __device__ __forceinline__ void store(TokenBlockMemory<T, kN>& memory) const {
    if (is_head) store_weights(stretch, count, memory.scores[lane()], memory.D[index], memory.table[index]);
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kMaxWindow); }
};

// y of the warp's channels, StateTile::channel() a lane.
template <typename T, int kN, typename State>
__device__ __forceinline__ float run_token(const MambaDecodeParams& params, const TokenBlock& share, State* slot_state,
                                           bool has_state, TokenBlockMemory<T, kN>& memory) {
  const SlotRow& row = share.row;
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
    const StretchFold fold(params, share.channels, base, end - base, memory.fold);
    fold.copy();
    fold.apply(state);
    base = end;
    round_state_at<State>(state, share.channels, base);
    if (base == row.next_base) state.store(slot_state);
  }
  __syncthreads();

  LaneQuery<T, kN> query;
  query.load(memory.C);
  const int channel = share.channels.first - share.first_channel;
  const LaneInputs<T> inputs(share.num_old + 1, StagedInputs<T>{memory.x + channel, share.num_channels});
  return read_out(state, query, inputs, memory.table[share.channels.head - share.first_head]);
}

}  // namespace headway::cuda
