// Depthwise causal convolution with silu over ragged rows, continued from and to state slots.
//
// A thread owns one 16-byte piece of channels (one channel where strides are not aligned) and slides over a tile of
// consecutive flat tokens with the last W - 1 raw columns in registers; a tile may span many rows. Every output is one
// sum of W products in tap order, so neither the tile size nor the way a row was cut into calls changes a bit.
//
// A slot is read and written by the thread whose tile has the row's first token, and by no other: the first W - 1
// tokens of a row, the only ones that look at the slot, belong to that tile even where they lie beyond its end, and it
// leaves its rows' last raw columns when all of them are filtered. So in-place slots need no ordering between blocks.
//
// A short prompt takes as long as the trips to memory that wait for one another. Weights are therefore loaded before
// the previous kernel is over, a tile's first columns before its rows are known, and what a row has all at once.
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
constexpr int kResidentBlocks = 4;  // a multiprocessor, at 128 registers a thread
constexpr int kMaxTileTokens = 1024;
constexpr int kShortTileTokens = 32;
constexpr int kBatch = 3;  // tokens loaded before the first is used; four would spill registers

struct Row {
  int begin;  // flat tokens
  int end;
  bool has_state;
  int32_t read_slot;
  int32_t write_slot;
};

// One thread's channels: kWidth of them, from `channel` on. kIsShort: the tile is. Most of its time is that of its
// first columns, which then are loaded in the order written, before anything else and by whole lines; long tiles lose
// by it.
template <typename T, int kTaps, int kWidth, bool kIsShort>
struct Channels {
  using Column = VectorBits<T, kWidth>;

  const CausalConv1dParams& params;
  int64_t channel;

  __device__ __forceinline__ Row row(int index) const {
    return {params.rows.query_start[index], params.rows.query_start[index + 1], params.rows.row_start[index] > 0,
            params.read_slots[index], params.write_slots[index]};
  }

  __device__ __forceinline__ const Column* input(int64_t token) const {
    return reinterpret_cast<const Column*>(static_cast<const T*>(params.x) + token * params.x_stride + channel);
  }

  static __device__ __forceinline__ Column load(const Column* x) {
    if constexpr (kIsShort && sizeof(Column) == kVectorBytes) {
      return load_line(x);
    } else {
      return *x;
    }
  }

  // Not load_once: the kernel before this one writes the columns.
  static __device__ __forceinline__ uint4 load_line(const uint4* x) {
    uint4 value;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(x));
    return value;
  }

  // The same channels some tokens later.
  __device__ __forceinline__ const Column* later(const Column* x, int num_tokens) const {
    return reinterpret_cast<const Column*>(reinterpret_cast<const T*>(x) + num_tokens * params.x_stride);
  }

  // x: of token `first`.
  __device__ __forceinline__ void fetch_batch(const Column* x, int first, int last) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < last) asm volatile("prefetch.global.L2 [%0];" ::"l"(later(x, i)) : "memory");
    }
  }

  __device__ __forceinline__ void load_batch(const Column* x, int first, int last, Column (&columns)[kBatch]) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < last) columns[i] = load(later(x, i));
    }
  }

  __device__ __forceinline__ Column& state(int32_t slot, int column) const {
    T* slot_begin = static_cast<T*>(params.state) + slot * params.state_stride;
    return *reinterpret_cast<Column*>(slot_begin + column * params.num_channels + channel);
  }

  // The raw columns before flat token `token` of the row: from the row itself, else from its slot, else zeros.
  __device__ __forceinline__ void load_window(const Row& row, int token, Column (&window)[kTaps - 1]) const {
#pragma unroll
    for (int tap = 0; tap < kTaps - 1; ++tap) {
      const int source = token - (kTaps - 1) + tap;
      window[tap] = Column{};
      if (source >= row.begin) {
        window[tap] = load(input(source));
      } else if (row.has_state) {
        window[tap] = state(row.read_slot, source - row.begin + kTaps - 1);
      }
    }
  }

  // Leaves the raw columns before flat token `token` in a slot. Loads all before it stores any: the slots may be one.
  __device__ __forceinline__ void store_columns(const Row& row, int token, int32_t slot) const {
    Column last[kTaps - 1];
    load_window(row, token, last);
#pragma unroll
    for (int tap = 0; tap < kTaps - 1; ++tap) state(slot, tap) = last[tap];
  }

  // The row's snapshots, then its own state, which may overwrite the columns that the snapshots begin with.
  __device__ __forceinline__ void store_states(int index) const {
    const Row row = this->row(index);
    const SnapshotList& snapshots = params.snapshots;
    if (snapshots.starts != nullptr) {
      for (int i = snapshots.starts[index]; i < snapshots.starts[index + 1]; ++i) {
        store_columns(row, row.begin + snapshots.positions[i] - params.rows.row_start[index], snapshots.slots[i]);
      }
    }
    store_columns(row, row.end, row.write_slot);
  }
};

template <typename T, int kTaps, int kWidth>
struct Filter {
  using Column = VectorBits<T, kWidth>;

  float weight[kTaps][kWidth];
  float bias[kWidth];
  float window[kTaps - 1][kWidth];

  __device__ __forceinline__ Filter(const CausalConv1dParams& params, int64_t channel) : bias{} {
    const T* weights = static_cast<const T*>(params.weight) + channel;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) load_floats<T, kWidth>(weights + tap * params.num_channels, weight[tap]);
    if (params.bias != nullptr) load_floats<T, kWidth>(static_cast<const T*>(params.bias) + channel, bias);
  }

  __device__ __forceinline__ void restart(const Column (&columns)[kTaps - 1]) {
#pragma unroll
    for (int tap = 0; tap < kTaps - 1; ++tap) {
      to_floats(as_vector<T, kWidth>(columns[tap]), window[tap]);
    }
  }

  // silu(bias + weight . [window, column]), then shifts the column into the window.
  __device__ __forceinline__ void step(Column column, T* out) {
    float newest[kWidth];
    float sum[kWidth];
    to_floats(as_vector<T, kWidth>(column), newest);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum[i] = bias[i];
#pragma unroll
      for (int tap = 0; tap < kTaps - 1; ++tap) sum[i] = fmaf(weight[tap][i], window[tap][i], sum[i]);
      sum[i] = fmaf(weight[kTaps - 1][i], newest[i], sum[i]);
      sum[i] = sizeof(T) == 4 ? silu(sum[i]) : fast_silu(sum[i]);
#pragma unroll
      for (int tap = 0; tap < kTaps - 2; ++tap) window[tap][i] = window[tap + 1][i];
      window[kTaps - 2][i] = newest[i];
    }
    store_floats<T, kWidth>(out, sum);
  }
};

// Flat tokens first .. last - 1 of a row; `columns` are the first batch of them.
template <typename T, int kTaps, int kWidth, bool kIsShort>
__device__ __forceinline__ void filter_tokens(const Channels<T, kTaps, kWidth, kIsShort>& channels,
                                              Filter<T, kTaps, kWidth>& filter, int first, int last,
                                              VectorBits<T, kWidth> (&columns)[kBatch]) {
  const int64_t num_channels = channels.params.num_channels;
  T* out = static_cast<T*>(channels.params.out) + first * num_channels + channels.channel;
  for (const VectorBits<T, kWidth>* x = channels.input(first); first + kBatch <= last; first += kBatch) {
    x = channels.later(x, kBatch);
    channels.fetch_batch(x, first + kBatch, last);
#pragma unroll
    for (int i = 0; i < kBatch; ++i, out += num_channels) filter.step(columns[i], out);
    channels.load_batch(x, first + kBatch, last, columns);
  }
#pragma unroll
  for (int i = 0; i < kBatch - 1; ++i, out += num_channels) {
    if (first + i >= last) return;
    filter.step(columns[i], out);
  }
}

template <typename T, int kTaps, int kWidth, bool kIsShort>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    causal_conv1d_kernel(CausalConv1dParams params, int tile_tokens, unsigned warps_per_tile) {
  allow_next_kernel();
  // Whole warps share a tile; the warps of a block may belong to different tiles.
  const unsigned warp = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  const unsigned tile = warp / warps_per_tile;
  const int64_t lane_channel = ((warp - tile * warps_per_tile) * kWarpSize + threadIdx.x % kWarpSize) * kWidth;
  const bool is_inside = lane_channel < params.num_channels;
  const Channels<T, kTaps, kWidth, kIsShort> channels{params, is_inside ? lane_channel : 0};
  Filter<T, kTaps, kWidth> filter(params, channels.channel);  // no kernel writes weights
  wait_for_previous_kernel();

  // Asked for together: columns, which depend on no row, the number of tokens and the tile's row.
  const auto tile_begin = static_cast<int>(tile * tile_tokens);
  const int batch_end = min(tile_begin + tile_tokens, static_cast<int>(params.num_tokens));
  VectorBits<T, kWidth> columns[kBatch];
  channels.load_batch(channels.input(tile_begin), tile_begin, batch_end, columns);
  const int32_t* query_start = params.rows.query_start;
  const int num_tokens = query_start[params.rows.num_rows];
  const int first_row = find_row(query_start, params.rows.num_rows, tile_begin);
  if (!is_inside || (tile > 0 && tile_begin >= num_tokens)) return;
  const int tile_end = min(tile_begin + tile_tokens, num_tokens);

  int token = tile_begin;
  for (int index = first_row; token < tile_end; ++index) {
    const Row row = channels.row(index);
    // A row begun in an earlier tile had its first W - 1 tokens there; one begun here keeps them here.
    const bool is_owner = row.begin >= tile_begin;
    const int first = is_owner ? row.begin : max(token, min(row.begin + kTaps - 1, row.end));
    const int last = min(row.end, is_owner ? max(tile_end, row.begin + kTaps - 1) : tile_end);
    token = row.end;
    if (first >= last) continue;
    VectorBits<T, kWidth> window[kTaps - 1];
    channels.load_window(row, first, window);
    if (first != tile_begin || last > batch_end) channels.load_batch(channels.input(first), first, last, columns);
    filter.restart(window);
    filter_tokens(channels, filter, first, last, columns);
  }

  // Rows begun here leave their states: those without tokens, too, and behind the last token in the last tile.
  int index = first_row;
  while (index > 0 && query_start[index - 1] >= tile_begin) --index;
  for (; index < params.rows.num_rows; ++index) {
    const int begin = query_start[index];
    if (begin >= tile_end && tile_end < num_tokens) break;
    if (begin >= tile_begin) channels.store_states(index);
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
  require(num_blocks <= INT32_MAX / kWarps, kOp, "num_tokens * num_channels is too large for one launch");
  const bool is_short = kWidth > 1 && tile_tokens <= kShortTileTokens;
  const auto kernel =
      is_short ? causal_conv1d_kernel<T, kTaps, kWidth, (kWidth > 1)> : causal_conv1d_kernel<T, kTaps, kWidth, false>;
  launch_chained(kOp, kernel, dim3(static_cast<unsigned>(num_blocks)), kThreads, stream, params, tile_tokens,
                 static_cast<unsigned>(warps_per_tile));
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
  require(params.num_tokens <= INT32_MAX - kMaxTileTokens, kOp, "num_tokens is too large for one launch");
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
