// Second half of the decode step over slot windows: the state, and what it and the inputs since give each new token.
//
// A warp owns 16 channels of a row. Their state, which no other kernel of the step touches, is on its way to registers
// before the launch before it is over; it goes back only when the window's base moves. The rest of a warp's needs it
// loads at once: C, the weights of the inputs since the base, and their x. Each block also starts fetching into the L2
// cache what the block will read that takes its place on the multiprocessor: memory then works while blocks compute.
#include "cuda/common/chained.cuh"
#include "cuda/common/device.h"
#include "cuda/state_window.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "mamba_decode";

// Blocks that a multiprocessor holds at once: by the registers of their states.
template <int kN>
constexpr int kResidentBlocks = kN > 128 ? 2 : 4;

// y of new tokens i .. i + count - 1, which share the canonical base `base` that the state is at.
template <typename T, int kN>
__device__ __forceinline__ void read_out(const MambaDecodeParams& params, const SlotRow& row,
                                         const StateChannels& channels, const StateTile<kN>& state, int base, int i,
                                         int count) {
  const unsigned lane = lane_index();
  const int64_t token = row.token + i;
  const int64_t token_width = conv_channels(params);
  const T* C = static_cast<const T*>(params.convolved) + token * token_width + inner_channels(params) +
               group_states(params) + static_cast<int64_t>(channels.group) * kN;
  const float* weights = params.table + (token * params.num_heads + channels.head) * kTableWidth;
  T* out = static_cast<T*>(params.scanned) + token * inner_channels(params) + channels.first + lane;
  LaneQuery<T, kN> query;
  query.load(C);
  const LogWalk<T> log(params, channels.slot, base, channels.first + lane % kTileChannels);
  const LaneInputs<T> inputs(row.start + i + count - base, [&](int input) { return *log.at(input); });
#pragma unroll 1
  for (;;) {
    const float sum = inputs.weighted_sum(weights);
    const float decay = weights[kMaxWindow];
    const float y = fmaf(decay, state.dot(query), sum);
    if (lane < kTileChannels) *out = from_float<T>(y);
    if (--count == 0) return;
    C += token_width;
    query.load(C);
    weights += params.num_heads * kTableWidth;
    out += inner_channels(params);
  }
}

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

// How far ahead a block fetches.
struct Wave {
  int rows;
  int blocks;
};

// The states of the block that comes a wave of blocks later.
struct LaterStates {
  const float* source;  // null: there are none to read

  __device__ __forceinline__ LaterStates(const MambaDecodeParams& params, const Wave& wave, int block_floats) {
    const int sum = static_cast<int>(blockIdx.x) + wave.blocks;
    const bool is_carried = sum >= static_cast<int>(gridDim.x);
    const int row = static_cast<int>(blockIdx.y) + wave.rows + (is_carried ? 1 : 0);
    const int block = is_carried ? sum - static_cast<int>(gridDim.x) : sum;
    const bool is_inside = row < params.rows.num_rows;
    const int64_t slot = params.slots[is_inside ? row : 0];
    const bool is_there = params.state_base[is_inside ? row : 0] > 0 && slot != 0;
    source = params.ssm_state + slot * params.ssm_state_stride + block * block_floats;
    if (!is_inside || !is_there) source = nullptr;
  }

  __device__ __forceinline__ void fetch(int num_bytes) const {
    if (threadIdx.x == 0 && source != nullptr) prefetch_bytes(source, num_bytes);
  }
};

// From one canonical base to the next, and the tokens between.
template <typename T, int kN>
__device__ __forceinline__ void fold_and_read(const MambaDecodeParams& params, const SlotRow& row,
                                              const StateChannels& channels, T (&B)[kMaxWindow * kN], float* slot_state,
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
      if (base == row.next_base) state.store(slot_state);
      continue;
    }
    const int count = min(row.num_tokens - i, window_end(position) - position);
    read_out<T, kN>(params, row, channels, state, base, i, count);
    i += count;
  }
}

template <typename T, int kN>
__global__ void __launch_bounds__(kFoldWarps* kWarpSize, kResidentBlocks<kN>)
    decode_state_kernel(MambaDecodeParams params, RowTiles tiles, Wave wave) {
  __shared__ alignas(16) T B[kMaxWindow * kN];
  const int num_warps = static_cast<int>(blockDim.x / kWarpSize);
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  const int block_floats = num_warps * kTileChannels * kN;

  // What the launch before does not write: the row and its state.
  const SlotRow row(params, static_cast<int>(blockIdx.y));
  const LaterStates later(params, wave, block_floats);
  const StateChannels channels = tiles.channels(row.slot, static_cast<int>(blockIdx.x) * num_warps + warp);
  float* slot_state = params.ssm_state + row.slot * params.ssm_state_stride + static_cast<int64_t>(channels.first) * kN;
  StateTile<kN> state;
  if (row.base > 0 && !row.is_padding()) {
    state.load(slot_state);
  } else {
    state.clear();
  }
  later.fetch(block_floats * static_cast<int>(sizeof(float)));
  wait_for_previous_kernel();
  allow_next_kernel();
  if (row.is_padding()) return clear_outputs<T>(params, row, channels);
  // Most steps fold nothing: theirs are all tokens of the window that the state is at the begin of.
  if (row.base >= row.canonical(row.start + row.num_tokens - 1)) {
    return read_out<T, kN>(params, row, channels, state, row.base, 0, row.num_tokens);
  }
  fold_and_read<T, kN>(params, row, channels, B, slot_state, state);
}

template <typename T, int kN>
void launch(const MambaDecodeParams& params, cudaStream_t stream) {
  require(params.head_dim % kTileChannels == 0, kOp,
          "head_dim is " + std::to_string(params.head_dim) + "; expected a multiple of 16");
  const RowTiles tiles(params);
  require(params.rows.num_rows <= 65535, kOp, "num_rows exceeds 65535");
  require(tiles.count <= 65535, kOp, "num_heads * head_dim is too large for one launch");
  // Blocks share one B; single warps while that leaves multiprocessors idle.
  const int64_t num_tiles = static_cast<int64_t>(params.rows.num_rows) * tiles.count;
  const int warps = choose_fold_warps(tiles.group_count, num_tiles >= 4096 ? kFoldWarps : num_tiles >= 1024 ? 2 : 1);
  const auto kernel = decode_state_kernel<T, kN>;
  const int ahead = resident_blocks(kernel, warps * kWarpSize, 0, kOp);
  const int row_blocks = tiles.count / warps;
  const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(params.rows.num_rows));
  launch_chained(kOp, kernel, grid, warps * kWarpSize, stream, params, tiles,
                 Wave{ahead / row_blocks, ahead % row_blocks});
}

}  // namespace

void launch_decode_state(const MambaDecodeParams& params, cudaStream_t stream) {
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (params.state_size == 64) return launch<T, 64>(params, stream);
    if (params.state_size == 128) return launch<T, 128>(params, stream);
    if (params.state_size == 256) return launch<T, 256>(params, stream);
    require(false, kOp, "state_size is " + std::to_string(params.state_size) + "; expected 64, 128 or 256");
  });
}

}  // namespace headway::cuda
