// Depthwise causal convolution with silu over ragged rows, continued from and to state slots.
//
// A thread owns one 16-byte piece of channels (one channel where strides are not aligned) and slides over a tile of
// consecutive flat tokens with the last W - 1 raw columns in registers; a tile may span many rows. Every output is one
// sum of W products in tap order, so neither the tile size nor the way a row was cut into calls changes a bit.
//
// A slot is read and written by the thread that owns the row's first token, and by no other: the first W - 1 tokens of
// a row, the only ones that look at the slot, belong to the tile of the row's first token even where they lie beyond
// its end, and that tile also writes the row's last raw columns. So in-place slots need no ordering between blocks.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/device.h"
#include "cuda/common/math.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "causal_conv1d";
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kResidentBlocks = 4;  // a multiprocessor, at 126 registers a thread
constexpr int kMaxTileTokens = 1024;
constexpr int kBatch = 4;  // tokens loaded before the first is used, to keep many loads in flight

// One thread's channels: kWidth of them, from `channel` on.
template <typename T, int kTaps, int kWidth>
struct Channels {
  using Column = Vector<T, kWidth>;

  const CausalConv1dParams& params;
  int64_t channel;

  __device__ __forceinline__ Column input(int64_t token) const {
    return *reinterpret_cast<const Column*>(static_cast<const T*>(params.x) + token * params.x_stride + channel);
  }

  __device__ __forceinline__ void prefetch(int64_t token) const {
    const T* column = static_cast<const T*>(params.x) + token * params.x_stride + channel;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(column) : "memory");
  }

  __device__ __forceinline__ Column& state(int32_t slot, int column) const {
    T* slot_begin = static_cast<T*>(params.state) + slot * params.state_stride;
    return *reinterpret_cast<Column*>(slot_begin + column * params.num_channels + channel);
  }

  // The raw columns before `token` of the row that begins at flat token `begin`: from the row itself, else from its
  // slot, else zeros.
  __device__ __forceinline__ void load_window(int row, int begin, int token, Column (&window)[kTaps - 1]) const {
    const bool has_state = params.rows.row_start[row] > 0;
    const int32_t slot = params.read_slots[row];
#pragma unroll
    for (int tap = 0; tap < kTaps - 1; ++tap) {
      const int source = token - (kTaps - 1) + tap;
      window[tap] = Column{};
      if (source >= begin) {
        window[tap] = input(source);
      } else if (has_state) {
        window[tap] = state(slot, source - begin + kTaps - 1);
      }
    }
  }

  // Leaves the raw columns before flat token `end` in a slot. Loads all before it stores any: the slots may be one.
  __device__ __forceinline__ void store_columns(int row, int begin, int end, int32_t slot) const {
    Column last[kTaps - 1];
    load_window(row, begin, end, last);
#pragma unroll
    for (int tap = 0; tap < kTaps - 1; ++tap) state(slot, tap) = last[tap];
  }

  // The row's snapshots, then its own state, which may overwrite the columns that the snapshots begin with.
  __device__ __forceinline__ void store_state(int row, int begin, int end) const {
    const SnapshotList& snapshots = params.snapshots;
    if (snapshots.starts != nullptr) {
      for (int i = snapshots.starts[row]; i < snapshots.starts[row + 1]; ++i) {
        store_columns(row, begin, begin + snapshots.positions[i] - params.rows.row_start[row], snapshots.slots[i]);
      }
    }
    store_columns(row, begin, end, params.write_slots[row]);
  }
};

template <typename T, int kTaps, int kWidth>
struct Filter {
  float weight[kTaps][kWidth];
  float bias[kWidth];
  float window[kTaps - 1][kWidth];

  __device__ __forceinline__ Filter(const CausalConv1dParams& params, int64_t channel) : bias{} {
    const T* weights = static_cast<const T*>(params.weight) + channel;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) load_floats<T, kWidth>(weights + tap * params.num_channels, weight[tap]);
    if (params.bias != nullptr) load_floats<T, kWidth>(static_cast<const T*>(params.bias) + channel, bias);
  }

  __device__ __forceinline__ void restart(const Vector<T, kWidth> (&columns)[kTaps - 1]) {
#pragma unroll
    for (int tap = 0; tap < kTaps - 1; ++tap) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) window[tap][i] = to_float(columns[tap].values[i]);
    }
  }

  // silu(bias + weight . [window, column]), then shifts the column into the window.
  __device__ __forceinline__ void step(const Vector<T, kWidth>& column, T* out) {
    float sum[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float newest = to_float(column.values[i]);
      sum[i] = bias[i];
#pragma unroll
      for (int tap = 0; tap < kTaps - 1; ++tap) sum[i] = fmaf(weight[tap][i], window[tap][i], sum[i]);
      sum[i] = fmaf(weight[kTaps - 1][i], newest, sum[i]);
      sum[i] = sizeof(T) == 4 ? silu(sum[i]) : fast_silu(sum[i]);
#pragma unroll
      for (int tap = 0; tap < kTaps - 2; ++tap) window[tap][i] = window[tap + 1][i];
      window[kTaps - 2][i] = newest;
    }
    store_floats<T, kWidth>(out, sum);
  }
};

template <typename T, int kTaps, int kWidth>
__device__ __forceinline__ void filter_tokens(const Channels<T, kTaps, kWidth>& channels,
                                              Filter<T, kTaps, kWidth>& filter, int first, int last) {
  const int64_t num_channels = channels.params.num_channels;
  T* out = static_cast<T*>(channels.params.out) + first * num_channels + channels.channel;
  for (; first + kBatch <= last; first += kBatch) {
    Vector<T, kWidth> columns[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) columns[i] = channels.input(first + i);
#pragma unroll
    for (int i = 0; i < kBatch; ++i, out += num_channels) filter.step(columns[i], out);
  }
  for (; first < last; ++first, out += num_channels) filter.step(channels.input(first), out);
}

template <typename T, int kTaps, int kWidth>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    causal_conv1d_kernel(CausalConv1dParams params, int tile_tokens, int warps_per_tile) {
  allow_next_kernel();
  // Whole warps share a tile; the warps of a block may belong to different tiles.
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int32_t* query_start = params.rows.query_start;
  wait_for_previous_kernel();
  const int num_tokens = query_start[params.rows.num_rows];
  const int64_t tile = warp / warps_per_tile;
  if (tile > 0 && tile * tile_tokens >= num_tokens) return;
  const int tile_begin = static_cast<int>(tile * tile_tokens);
  const int tile_end = min(tile_begin + tile_tokens, num_tokens);
  const int64_t channel = ((warp - tile * warps_per_tile) * kWarpSize + threadIdx.x % kWarpSize) * kWidth;
  const Channels<T, kTaps, kWidth> channels{params, channel};
  // The first inputs are on their way while the row is looked for.
  if (channel < params.num_channels) {
    for (int i = 0; i < kBatch && tile_begin + i < tile_end; ++i) channels.prefetch(tile_begin + i);
  }
  int row = find_row(query_start, params.rows.num_rows, tile_begin);
  if (channel >= params.num_channels) return;
  Filter<T, kTaps, kWidth> filter(params, channel);

  for (int token = tile_begin; token < tile_end; ++row) {
    const int begin = query_start[row];
    const int end = query_start[row + 1];
    if (begin == end) continue;
    // A row begun in an earlier tile had its first W - 1 tokens there; one begun here keeps them here.
    const bool is_owner = begin >= tile_begin;
    const int first = is_owner ? begin : max(token, min(begin + kTaps - 1, end));
    const int last = min(end, is_owner ? max(tile_end, begin + kTaps - 1) : tile_end);
    token = end;
    if (first < last) {
      Vector<T, kWidth> window[kTaps - 1];
      channels.load_window(row, begin, first, window);
      filter.restart(window);
    }
    if (is_owner) {
      channels.store_state(row, begin, end);
      // Rows without tokens just before this one hand their state on.
      for (int empty = row - 1; empty >= 0 && query_start[empty] == begin; --empty) {
        channels.store_state(empty, begin, begin);
      }
    }
    filter_tokens(channels, filter, first, last);
  }
  if (tile_end == num_tokens) {
    // So do those behind the last token, or all of them when there is no token.
    if (num_tokens == 0) row = 0;
    for (; row < params.rows.num_rows; ++row) channels.store_state(row, num_tokens, num_tokens);
  }
}

// As many tiles as the chip holds at once, or a few times that: long tiles read little twice, and a last wave that is
// mostly empty costs as much as a full one.
int64_t choose_tile_tokens(int64_t num_tokens, int64_t warps_per_tile) {
  const int64_t resident_warps =
      static_cast<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount, kOp)) * kResidentBlocks * kWarps;
  const int64_t tiles_at_once = std::max<int64_t>(resident_warps / warps_per_tile, 1);
  const int64_t num_waves = (num_tokens + tiles_at_once * kMaxTileTokens - 1) / (tiles_at_once * kMaxTileTokens);
  const int64_t num_tiles = std::max<int64_t>(num_waves, 1) * tiles_at_once;
  return std::max<int64_t>((num_tokens + num_tiles - 1) / num_tiles, 1);
}

template <typename T, int kTaps, int kWidth>
void launch(const CausalConv1dParams& params, cudaStream_t stream) {
  const int64_t lanes = params.num_channels / kWidth;
  const int64_t warps_per_tile = (lanes + kWarpSize - 1) / kWarpSize;
  const auto tile_tokens = static_cast<int>(choose_tile_tokens(params.num_tokens, warps_per_tile));
  const int64_t num_tiles = params.num_tokens == 0 ? 1 : (params.num_tokens + tile_tokens - 1) / tile_tokens;
  const int64_t num_blocks = (num_tiles * warps_per_tile + kWarps - 1) / kWarps;
  require(num_blocks <= INT32_MAX, kOp, "num_tokens * num_channels is too large for one launch");
  launch_chained(kOp, causal_conv1d_kernel<T, kTaps, kWidth>, dim3(static_cast<unsigned>(num_blocks)), kThreads, stream,
                 params, tile_tokens, static_cast<int>(warps_per_tile));
}

template <typename T, int kWidth>
void launch_taps(const CausalConv1dParams& params, cudaStream_t stream) {
  switch (params.width) {
    case 2:
      return launch<T, 2, kWidth>(params, stream);
    case 3:
      return launch<T, 3, kWidth>(params, stream);
    case 4:
      return launch<T, 4, kWidth>(params, stream);
    default:
      require(false, kOp, "width is " + std::to_string(params.width) + "; expected 2, 3 or 4");
  }
}

}  // namespace

void causal_conv1d(const CausalConv1dParams& params, Stream stream) {
  if (params.rows.num_rows == 0 || params.num_channels == 0) return;
  require(params.num_tokens <= INT32_MAX, kOp, "num_tokens is too large for one launch");
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool is_aligned = is_vectorisable<T>(params.x, params.x_stride, params.num_channels) &&
                            is_vectorisable<T>(params.state, params.state_stride, params.num_channels) &&
                            is_vectorisable<T>(params.weight, params.num_channels, params.num_channels) &&
                            is_vectorisable<T>(params.bias, params.num_channels, params.num_channels) &&
                            is_vectorisable<T>(params.out, params.num_channels, params.num_channels);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (is_aligned) {
      launch_taps<T, kVectorWidth<T>>(params, cuda_stream);
    } else {
      launch_taps<T, 1>(params, cuda_stream);
    }
  });
}

}  // namespace headway::cuda
