// Second half of the decode step over slot windows: the state, and what it and the inputs since give each new token.
//
// A warp works on 16 channels of a row after the other. Their state, which no other kernel of the step touches, is on
// its way before the launch before it, or the warp's work on other channels, is over; it goes back only when the
// window's base moves. The rest of a warp's needs is copied at once: C, the weights of the inputs since the base, their
// x, and B of those to fold.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/device.h"
#include "cuda/state_window.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "mamba_decode";

// Warps that a multiprocessor holds at once: by the registers of their states.
template <int kN>
constexpr int kResidentWarps = kN > 128 ? 8 : 12;

// What a warp works on: 16 channels of a row.
struct RowTile {
  SlotRow row;
  StateChannels channels;

  __device__ __forceinline__ RowTile(const MambaDecodeParams& params, const RowRecord& record, int tile)
      : row(params, record), channels(params, row.slot, tile) {}

  __device__ __forceinline__ bool is_padding() const { return row.is_padding(); }
  __device__ __forceinline__ int end() const { return row.start + row.num_tokens; }
  __device__ __forceinline__ bool folds(int base) const { return base < row.canonical(end() - 1); }
};

// A warp's shared memory: what does not depend on the step, then the new tokens' C [max_query_len, N] and table rows.
template <typename T, int kN>
struct WarpMemory {
  struct Fixed {
    StateStage<T, kN> stage;
    alignas(16) RowRecord row;  // of the tile after the one under way
  };
  StateStage<T, kN>& stage;
  RowRecord& row;
  T* C;
  float* table;

  __device__ __forceinline__ WarpMemory(unsigned char* memory, int max_query_len)
      : stage(reinterpret_cast<Fixed*>(memory)->stage),
        row(reinterpret_cast<Fixed*>(memory)->row),
        C(reinterpret_cast<T*>(memory + sizeof(Fixed))),
        table(reinterpret_cast<float*>(C + max_query_len * kN)) {}

  static int bytes(int max_query_len) {
    const size_t a_query = kN * sizeof(T) + kTableWidth * sizeof(float);
    return static_cast<int>(sizeof(Fixed) + max_query_len * a_query);
  }

  __device__ __forceinline__ void copy_row(const MambaDecodeParams& params, int row_idx) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int32_t* source = params.rows.query_start;
    if (lane == 1) source += 1;
    if (lane == 2) source = params.rows.row_start;
    if (lane == 3) source = params.state_base;
    if (lane == 4) source = params.slots;
    if (lane < 5) copy_word_async(shared_address(reinterpret_cast<int*>(&row) + lane), source + row_idx);
  }

  // x from `base` on.
  __device__ __forceinline__ void copy_x(const MambaDecodeParams& params, const RowTile& tile, int base) {
    stage.copy_x(params, tile.channels, base, min(tile.end() - base, StateStage<T, kN>::kMaxInputs));
  }

  // What the head's tiles share of the stretch to fold from `base` on: B, and the lane's raw step size.
  __device__ __forceinline__ T copy_stretch(const MambaDecodeParams& params, const RowTile& tile, int base) {
    const int count = window_end(base) - base;
    stage.copy_B(params, tile.channels, base, count);
    return load_raw_dt<T>(params, tile.channels, base, count);
  }

  // C and the table's row of each new token.
  __device__ __forceinline__ void copy_queries(const MambaDecodeParams& params, const RowTile& tile) {
    constexpr int kPieces = kN / kVectorWidth<T>;
    constexpr int kTablePieces = kTableWidth / kVectorWidth<float>;
    const int64_t first_state =
        inner_channels(params) + group_states(params) + static_cast<int64_t>(tile.channels.group) * kN;
#pragma unroll 1
    for (int index = static_cast<int>(threadIdx.x) % kWarpSize; index < tile.row.num_tokens * (kPieces + kTablePieces);
         index += kWarpSize) {
      const int i = index / (kPieces + kTablePieces);
      const int piece = index % (kPieces + kTablePieces);
      const int64_t token = tile.row.token + i;
      if (piece < kPieces) {
        const T* source = static_cast<const T*>(params.convolved) + token * conv_channels(params) + first_state;
        copy_async(shared_address(C + i * kN + piece * kVectorWidth<T>), source + piece * kVectorWidth<T>, true);
      } else {
        const float* source = params.table + (token * params.num_heads + tile.channels.head) * kTableWidth;
        const int offset = (piece - kPieces) * kVectorWidth<float>;
        copy_async(shared_address(table + i * kTableWidth + offset), source + offset, true);
      }
    }
  }
};

// y of new tokens i .. i + count - 1, which share the canonical base that the state is at; x are the inputs from there
// on.
template <typename T, int kN>
__device__ __forceinline__ void read_out(const MambaDecodeParams& params, const RowTile& tile,
                                         const StateTile<kN>& state, const WarpMemory<T, kN>& memory, const T* x,
                                         int base, int i, int count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int half = lane / kTileChannels;  // takes every other input
  x += lane % kTileChannels;
  const int num_inputs = tile.row.start + i + count - base;
  float inputs[kMaxWindow / 2];
#pragma unroll
  for (int k = 0; k < kMaxWindow / 2; ++k) {
    const int input = 2 * k + half;
    inputs[k] = input < num_inputs ? to_float(x[input * kTileChannels]) : 0.0f;
  }
  const float D = params.D[tile.channels.head];
  T* out = static_cast<T*>(params.scanned) + tile.row.token * inner_channels(params) + tile.channels.first + lane;
  for (const int end = i + count; i < end; ++i) {
    const float dot = state.dot(memory.C + i * kN);
    const float* weights = memory.table + i * kTableWidth;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kMaxWindow / 2; ++k) sum = fmaf(weights[2 * k + half], inputs[k], sum);
    sum += __shfl_xor_sync(kFullWarp, sum, kTileChannels);
    const float own = to_float(x[(tile.row.start + i - base) * kTileChannels]);
    const float y = fmaf(D, own, fmaf(weights[kMaxWindow], dot, sum));
    if (lane < kTileChannels) out[i * inner_channels(params)] = from_float<T>(y);
  }
}

__device__ __forceinline__ bool is_lane_of_channel() {
  return threadIdx.x % kWarpSize < kTileChannels;
}

template <typename T>
__device__ __forceinline__ void clear_outputs(const MambaDecodeParams& params, const RowTile& tile) {
  T* out = static_cast<T*>(params.scanned) + tile.row.token * inner_channels(params) + tile.channels.first;
  for (int i = 0; i < tile.row.num_tokens; ++i) {
    if (is_lane_of_channel()) out[i * inner_channels(params) + threadIdx.x % kWarpSize] = from_float<T>(0.0f);
  }
}

// From one canonical base to the next, and the tokens between. The log from the slot's base on is staged, `weights` are
// of its first stretch. Returns whether the stage still holds that.
template <typename T, int kN>
__device__ __forceinline__ bool advance(const MambaDecodeParams& params, const RowTile& tile, FoldWeights weights,
                                        WarpMemory<T, kN>& memory, StateTile<kN>& state) {
  const SlotRow& row = tile.row;
  int base = row.base;
  int staged = base;  // the first position in the stage
  for (int i = 0; i < row.num_tokens;) {
    const int position = row.start + i;
    const bool folds = base < row.canonical(position);
    const int count = folds ? window_end(base) - base : min(row.num_tokens - i, window_end(position) - position);
    const int end = folds ? base + count : position + count;
    if (folds ? staged != base : end - staged > StateStage<T, kN>::kMaxInputs) {
      __syncwarp();  // nobody reads the stage any more
      memory.copy_x(params, tile, base);
      if (tile.folds(base)) {
        const T raw_dt = memory.copy_stretch(params, tile, base);
        weights = FoldWeights(params, tile.channels.head, raw_dt, window_end(base) - base);
      }
      commit_copies();
      wait_copies<0>();
      __syncwarp();
      staged = base;
    }
    if (folds) {
      state.fold(weights.decay, weights.input, memory.stage.x, memory.stage.B);
      base = end;
      if (base == row.next_base) {
        state.store(params.ssm_state + row.slot * params.ssm_state_stride +
                    static_cast<int64_t>(tile.channels.first) * kN);
      }
    } else {
      read_out<T, kN>(params, tile, state, memory, memory.stage.x + (base - staged) * kTileChannels, base, i, count);
      i += count;
    }
  }
  return staged == row.base;
}

// One warp a block, over every gridDim.x-th run of tiles, which are of one head. While a tile is in registers, the next
// one's state is on its way; the first one's is before the launch before is over, which writes no state.
template <typename T, int kN>
__global__ void __launch_bounds__(kWarpSize, kResidentWarps<kN>)
    decode_state_kernel(MambaDecodeParams params, int num_runs, int runs_a_row, int run_tiles) {
  extern __shared__ __align__(16) unsigned char shared[];
  WarpMemory<T, kN> memory(shared, params.max_query_len);
  const auto first_tile = [&](const RowRecord& record, int run) {
    return RowTile(params, record, run % runs_a_row * run_tiles);
  };
  int run = static_cast<int>(blockIdx.x);
  RowTile tile = first_tile(record_of(params, run / runs_a_row), run);
  if (!tile.is_padding()) memory.stage.copy_state(params, tile.channels, tile.row.base > 0);
  wait_for_previous_kernel();
  allow_next_kernel();
  FoldWeights weights{};
  T raw_dt{};
  bool is_staged = false;  // what a head's tiles share
  for (int left = run_tiles;;) {
    const bool is_shared = is_staged;
    if (!tile.is_padding()) {
      memory.copy_x(params, tile, tile.row.base);
      if (!is_staged) {
        memory.copy_queries(params, tile);
        if (tile.folds(tile.row.base)) raw_dt = memory.copy_stretch(params, tile, tile.row.base);
      }
    }
    const bool ends = --left == 0;
    if (ends) run += static_cast<int>(gridDim.x);
    const bool is_last = run >= num_runs;
    if (ends && !is_last) memory.copy_row(params, run / runs_a_row);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    StateTile<kN> state;
    state.load(memory.stage.state);
    __syncwarp();
    if (!is_last) {  // built again below: no registers for it meanwhile
      RowTile next = ends ? first_tile(memory.row, run) : tile;
      if (!ends) next.channels.first += kTileChannels;
      if (!next.is_padding()) memory.stage.copy_state(params, next.channels, next.row.base > 0);
    }
    if (tile.is_padding()) {
      clear_outputs<T>(params, tile);
    } else {
      if (!is_shared && tile.folds(tile.row.base)) {
        weights = FoldWeights(params, tile.channels.head, raw_dt, window_end(tile.row.base) - tile.row.base);
      }
      is_staged = advance<T, kN>(params, tile, weights, memory, state);
    }
    if (is_last) return;
    __syncwarp();
    if (ends) {
      tile = first_tile(memory.row, run);
      left = run_tiles;
      is_staged = false;
      __syncwarp();
    } else {
      tile.channels.first += kTileChannels;
    }
  }
}

// Tiles of a run: a whole head, whose tiles share more than their state, unless that leaves multiprocessors idle.
inline int choose_run_tiles(int64_t num_tiles, int head_tiles, int resident) {
  const auto rounds = [&](int64_t num_runs) { return (num_runs + resident - 1) / resident; };
  const int64_t by_tile = rounds(num_tiles);
  const int64_t by_head = rounds(num_tiles / head_tiles) * head_tiles;
  return by_head <= by_tile + by_tile / 8 ? head_tiles : 1;
}

template <typename T, int kN>
void launch(const MambaDecodeParams& params, cudaStream_t stream) {
  require(params.head_dim % kTileChannels == 0, kOp,
          "head_dim is " + std::to_string(params.head_dim) + "; expected a multiple of 16");
  const int head_tiles = params.head_dim / kTileChannels;
  const int64_t num_tiles = static_cast<int64_t>(params.rows.num_rows) * params.num_heads * head_tiles;
  require(num_tiles <= INT32_MAX / 2, kOp, "num_rows * num_heads is too large for one launch");
  const auto kernel = decode_state_kernel<T, kN>;
  const int shared_bytes = WarpMemory<T, kN>::bytes(params.max_query_len);
  const int resident = resident_blocks(kernel, kWarpSize, shared_bytes, kOp);
  const int run_tiles = choose_run_tiles(num_tiles, head_tiles, resident);
  const int num_runs = static_cast<int>(num_tiles / run_tiles);
  const int num_blocks = std::min(num_runs, resident);
  launch_chained_wide(kOp, kernel, dim3(static_cast<unsigned>(num_blocks)), kWarpSize, shared_bytes, stream, params,
                        num_runs, params.num_heads * head_tiles / run_tiles, run_tiles);
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
