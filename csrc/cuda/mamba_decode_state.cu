// Second half of the decode step over slot windows: the state, and what it and the inputs since give each new token.
//
// A warp owns 16 channels of a row. Their state, which no other kernel of the step touches, is on its way to registers
// before the launch before it is over; it goes back only when the window's base moves. The rest of a warp's needs it
// loads at once: C, the weights of the inputs since the base, and their x.
#include "cuda/common/chained.cuh"
#include "cuda/state_window.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "mamba_decode";

// Blocks that a multiprocessor holds at once: by the registers of their states.
template <int kN>
constexpr int kResidentBlocks = kN > 128 ? 2 : 4;

// y of new tokens i .. i + count - 1, which share the canonical base `base` that the state is at. To construct it
// starts the loads that it needs.
template <typename T, int kN>
class ReadOut {
 public:
  __device__ __forceinline__ ReadOut(const MambaDecodeParams& params, const SlotRow& row, const StateChannels& channels,
                                     int base, int i, int count)
      : params_(params),
        first_token_(row.token + i),
        channels_(channels),
        count_(count),
        inputs_(row.start + i + count - base,
                LogWalk<T>(params, channels.slot, base, channels.first + lane_index() % kTileChannels)) {
    query_.load(query_at(0));
  }

  __device__ __forceinline__ void run(const StateTile<kN>& state) const {
    const unsigned lane = lane_index();
    const float* weights = params_.table + (first_token_ * params_.num_heads + channels_.head) * kTableWidth;
    T* out = static_cast<T*>(params_.scanned) + first_token_ * inner_channels(params_) + channels_.first + lane;
    LaneQuery<T, kN> query = query_;
#pragma unroll 1
    for (int i = 0;;) {
      const float sum = inputs_.weighted_sum(weights);
      const float decay = weights[kMaxWindow];
      const float y = fmaf(decay, state.dot(query), sum);
      if (lane < kTileChannels) *out = from_float<T>(y);
      if (++i == count_) return;
      query.load(query_at(i));
      weights += params_.num_heads * kTableWidth;
      out += inner_channels(params_);
    }
  }

 private:
  __device__ __forceinline__ const T* query_at(int i) const {
    return static_cast<const T*>(params_.convolved) + (first_token_ + i) * conv_channels(params_) +
           inner_channels(params_) + group_states(params_) + static_cast<int64_t>(channels_.group) * kN;
  }

  const MambaDecodeParams& params_;
  int64_t first_token_;
  const StateChannels& channels_;
  int count_;
  LaneInputs<T> inputs_;
  LaneQuery<T, kN> query_;
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

// From one canonical base to the next, and the tokens between.
template <typename T, int kN, typename State>
__device__ __forceinline__ void fold_and_read(const MambaDecodeParams& params, const SlotRow& row,
                                              const StateChannels& channels, T (&B)[kMaxWindow * kN], State* slot_state,
                                              StateTile<kN>& state) {
  int base = row.base;
#pragma unroll 1
  for (int i = 0; i < row.num_tokens;) {
    const int position = row.start + i;
    if (base < row.canonical(position)) {
      if (base > row.base) __syncthreads();  // B is folded
      const int end = window_end(base);
      StretchFold<T, kN>(params, channels, base, end - base, B).apply(state);
      base = end;
      round_state_at<State>(state, channels, base);
      if (base == row.next_base) state.store(slot_state);
      continue;
    }
    const int count = min(row.num_tokens - i, window_end(position) - position);
    ReadOut<T, kN>(params, row, channels, base, i, count).run(state);
    i += count;
  }
}

template <typename T, int kN, typename State>
__global__ void __launch_bounds__(kFoldWarps* kWarpSize, kResidentBlocks<kN>)
    decode_state_kernel(MambaDecodeParams params, RowTiles tiles) {
  __shared__ alignas(16) T B[kMaxWindow * kN];
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
  wait_for_previous_kernel();
  allow_next_kernel();
  if (row.is_padding()) return clear_outputs<T>(params, row, channels);
  if (row.num_tokens == 0) return;
  // Most steps fold nothing: theirs are all tokens of the window that the state is at the begin of.
  if (row.base >= row.canonical(row.start + row.num_tokens - 1)) {
    const ReadOut<T, kN> read_out(params, row, channels, row.base, 0, row.num_tokens);
    load.end(state);
    return read_out.run(state);
  }
  load.end(state);
  fold_and_read<T, kN>(params, row, channels, B, slot_state, state);
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
