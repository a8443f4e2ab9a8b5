// Second half of the decode step over slot windows: the state, and what it and the inputs since give each new token.
//
// A warp owns 16 channels of a row. Their state, which no other kernel of the step touches, is on its way to registers
// before the launch before it is over, and so are a window's inputs that are to be folded; it goes back only when the
// window's base moves. What else it takes, C, the weights of the inputs since the base and their x, is copied to shared
// memory for all of the row's tokens at once.
#include "cuda/common/chained.cuh"
#include "cuda/state_fold.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "mamba_decode";

// Blocks that a multiprocessor holds at once: by the registers of their states.
template <int kN>
constexpr int kResidentBlocks = kN > 128 ? 2 : 4;

// Token i's place among the outputs, at a lane's channel.
template <typename T, int kN>
__device__ __forceinline__ T* output_of(const MambaDecodeParams& params, const SlotRow& row,
                                        const StateChannels& channels, int i) {
  return static_cast<T*>(params.scanned) + (row.token + i) * inner_channels(params) + channels.first +
         StateTile<kN>::channel();
}

// C of a row's token i, and the weights of its inputs.
template <typename T, int kN>
__device__ __forceinline__ const T* query_of(const MambaDecodeParams& params, const SlotRow& row,
                                             const StateChannels& channels, int i) {
  return static_cast<const T*>(params.convolved) + (row.token + i) * conv_channels(params) + inner_channels(params) +
         group_states(params) + static_cast<int64_t>(channels.group) * kN;
}
__device__ __forceinline__ const float* weights_of(const MambaDecodeParams& params, const SlotRow& row,
                                                   const StateChannels& channels) {
  return params.table + (static_cast<int64_t>(row.token) * params.num_heads + channels.head) * kTableWidth;
}

// A row's only new token, of the window that the state is at the begin of: straight to registers, on their way together
// with the state.
template <typename T, int kN>
class OneToken {
 public:
  __device__ __forceinline__ OneToken(const MambaDecodeParams& params, const SlotRow& row,
                                      const StateChannels& channels)
      : inputs_(row.start + 1 - row.base, LogWalk<T>(params, channels.slot, row.base, channels.first)),
        weights_(weights_of(params, row, channels)),
        out_(output_of<T, kN>(params, row, channels, 0)) {
    query_.load(query_of<T, kN>(params, row, channels, 0));
  }

  __device__ __forceinline__ void run(const StateTile<kN>& state) const {
    const float y = read_out(state, query_, inputs_, weights_);
    if (StateTile<kN>::is_owner()) *out_ = from_float<T>(y);
  }

 private:
  LaneInputs<T> inputs_;
  LaneQuery<T, kN> query_;
  const float* weights_;
  T* out_;
};

// What a block reads the row's new tokens out with: the group's C, each warp's x and weights.
template <typename T, int kN>
struct TokenMemory {
  alignas(16) T C[kMaxQuery * kN];
  alignas(16) T x[kFoldWarps][kMaxEntries * kTileChannels];  // from the first token's canonical base on
  alignas(16) float table[kFoldWarps][kMaxQuery * kTableWidth];
};

// A row's new tokens in shared memory. To construct it starts the copies: a warp that has its state then waits for
// nothing but them, whatever the number of tokens, and its registers are soon free for the next one's state.
template <typename T, int kN>
class StagedTokens {
 public:
  __device__ __forceinline__ StagedTokens(const MambaDecodeParams& params, const SlotRow& row,
                                          const StateChannels& channels, TokenMemory<T, kN>& memory)
      : params_(params), row_(row), channels_(channels), memory_(memory), first_(row.canonical(row.start)) {
    copy_queries();
    copy_inputs();
    copy_weights();
    commit_copies();
  }

  // All of a block's threads at once.
  __device__ __forceinline__ void wait() const {
    wait_copies<0>();
    __syncthreads();
  }

  // y of new tokens i .. i + count - 1, which share the canonical base `base` that the state is at.
  __device__ __forceinline__ void run(const StateTile<kN>& state, int base, int i, int count) const {
    const T* x = memory_.x[warp()] + (base - first_) * kTileChannels;
    const LaneInputs<T> inputs(row_.start + i + count - base, StagedInputs<T>{x, kTileChannels});
    const int end = i + count;
    T* out = output_of<T, kN>(params_, row_, channels_, i);
#pragma unroll 1
    for (; i < end; ++i) {
      LaneQuery<T, kN> query;
      query.load(memory_.C + i * kN);
      const float y = read_out(state, query, inputs, memory_.table[warp()] + i * kTableWidth);
      if (StateTile<kN>::is_owner()) *out = from_float<T>(y);
      out += inner_channels(params_);
    }
  }

 private:
  static constexpr int kWidth = kVectorWidth<T>;

  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / kWarpSize); }

  __device__ __forceinline__ void copy_queries() const {
    constexpr int kPieces = kN / kWidth;
    const T* source = query_of<T, kN>(params_, row_, channels_, 0);
#pragma unroll 1
    for (int index = static_cast<int>(threadIdx.x); index < row_.num_tokens * kPieces;
         index += static_cast<int>(blockDim.x)) {
      const T* piece = source + index / kPieces * conv_channels(params_) + index % kPieces * kWidth;
      copy_async(shared_address(memory_.C + index * kWidth), piece, true);
    }
  }
  __device__ __forceinline__ void copy_inputs() const {
    constexpr int kPieces = kTileChannels / kWidth;
    const LogWalk<T> log(params_, channels_.slot, first_, channels_.first);
    const int num_entries = row_.start + row_.num_tokens - first_;
#pragma unroll 1
    for (int index = static_cast<int>(lane_index()); index < num_entries * kPieces; index += kWarpSize) {
      const T* piece = log.at(index / kPieces) + index % kPieces * kWidth;
      copy_async(shared_address(memory_.x[warp()] + index * kWidth), piece, true);
    }
  }
  __device__ __forceinline__ void copy_weights() const {
    constexpr int kPieces = kTableWidth / kVectorWidth<float>;
    const float* source = weights_of(params_, row_, channels_);
#pragma unroll 1
    for (int index = static_cast<int>(lane_index()); index < row_.num_tokens * kPieces; index += kWarpSize) {
      const float* piece =
          source + index / kPieces * params_.num_heads * kTableWidth + index % kPieces * kVectorWidth<float>;
      copy_async(shared_address(memory_.table[warp()] + index * kVectorWidth<float>), piece, true);
    }
  }

  const MambaDecodeParams& params_;
  const SlotRow& row_;
  const StateChannels& channels_;
  TokenMemory<T, kN>& memory_;
  int first_;
};

template <typename T>
__device__ __forceinline__ void clear_outputs(const MambaDecodeParams& params, const SlotRow& row,
                                              const StateChannels& channels) {
  const unsigned lane = lane_index();
  T* out = static_cast<T*>(params.scanned) + row.token * inner_channels(params) + channels.first + lane;
#pragma unroll 1
  for (int i = 0; i < row.num_tokens; ++i) {
    if (lane < kTileChannels) out[i * inner_channels(params)] = from_float<T>(0.0f);
  }
}

template <typename T, int kN>
struct BlockMemory {
  FoldMemory<T, kN> fold;
  TokenMemory<T, kN> tokens;
};

// From one canonical base to the next, and the tokens between.
template <typename T, int kN, typename State>
__device__ __forceinline__ void fold_and_read(const MambaDecodeParams& params, const SlotRow& row,
                                              const StateChannels& channels, const TileLoad<State, kN>& load,
                                              State* slot_state, StateTile<kN>& state, BlockMemory<T, kN>& memory) {
  const auto stretch_from = [&](int base) {
    return StretchFold(params, channels, base, window_end(base) - base, memory.fold);
  };
  int base = row.base;
  bool is_copied = window_end(base) <= row.start;  // the launch before writes none of these
  if (is_copied) stretch_from(base).copy();
  wait_for_previous_kernel();
  allow_next_kernel();
  const StagedTokens<T, kN> tokens(params, row, channels, memory.tokens);
  load.end(state);
#pragma unroll 1
  for (int i = 0; i < row.num_tokens;) {
    const int position = row.start + i;
    if (base < row.canonical(position)) {
      if (base > row.base) __syncthreads();  // the stretch before is folded
      if (!is_copied) stretch_from(base).copy();
      stretch_from(base).apply(state);
      is_copied = false;
      base = window_end(base);
      round_state_at<State>(state, channels, base);
      if (base == row.next_base) state.store(slot_state);
      continue;
    }
    const int count = min(row.num_tokens - i, window_end(position) - position);
    tokens.wait();
    tokens.run(state, base, i, count);
    i += count;
  }
}

template <typename T, int kN, typename State>
__global__ void __launch_bounds__(kFoldWarps* kWarpSize, kResidentBlocks<kN>)
    decode_state_kernel(MambaDecodeParams params, RowTiles tiles) {
  __shared__ BlockMemory<T, kN> memory;
  const int num_warps = static_cast<int>(blockDim.x / kWarpSize);
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);

  // What the launch before does not write: the row and its state.
  const SlotRow row(params, static_cast<int>(blockIdx.y));
  const StateChannels channels = tiles.channels(row.slot, static_cast<int>(blockIdx.x) * num_warps + warp);
  State* slot_state = static_cast<State*>(params.ssm_state) + row.slot * params.ssm_state_stride +
                      static_cast<int64_t>(channels.first) * kN;
  StateTile<kN> state;
  TileLoad<State, kN> load;
  load.begin(state, slot_state, row.base > 0 && !row.is_padding());
  // Most steps fold nothing: theirs are all tokens of the window that the state is at the begin of.
  const bool is_at_work = !row.is_padding() && row.num_tokens > 0;
  if (is_at_work && row.base < row.canonical(row.start + row.num_tokens - 1)) {
    return fold_and_read<T, kN>(params, row, channels, load, slot_state, state, memory);
  }
  wait_for_previous_kernel();
  allow_next_kernel();
  if (row.is_padding()) return clear_outputs<T>(params, row, channels);
  if (row.num_tokens == 0) return;
  if (row.num_tokens == 1) {
    const OneToken<T, kN> token(params, row, channels);
    load.end(state);
    return token.run(state);
  }
  const StagedTokens<T, kN> tokens(params, row, channels, memory.tokens);
  tokens.wait();
  load.end(state);
  tokens.run(state, row.base, 0, row.num_tokens);
}

template <typename T, int kN, typename State>
void launch(const MambaDecodeParams& params, cudaStream_t stream) {
  require(params.head_dim % kTileChannels == 0, kOp,
          "head_dim is " + std::to_string(params.head_dim) + "; expected a multiple of 16");
  const RowTiles tiles(params);
  require(params.rows.num_rows <= 65535, kOp, "num_rows exceeds 65535");
  require(tiles.count <= 65535, kOp, "num_heads * head_dim is too large for one launch");
  // Blocks share one B; single warps while that leaves multiprocessors idle.
  const int64_t num_tiles = static_cast<int64_t>(params.rows.num_rows) * tiles.count;
  const int warps = choose_fold_warps(tiles.group_count, num_tiles >= 4096 ? kFoldWarps : num_tiles >= 1024 ? 2 : 1);
  const dim3 grid(static_cast<unsigned>(tiles.count / warps), static_cast<unsigned>(params.rows.num_rows));
  launch_chained(kOp, decode_state_kernel<T, kN, State>, grid, warps * kWarpSize, stream, params, tiles);
}

}  // namespace

void launch_decode_state(const MambaDecodeParams& params, cudaStream_t stream) {
  dispatch_mixer(params, kOp, [&](auto tag, auto state_size, auto state) {
    launch<typename decltype(tag)::Type, decltype(state_size)::value, typename decltype(state)::Type>(params, stream);
  });
}

}  // namespace headway::cuda
