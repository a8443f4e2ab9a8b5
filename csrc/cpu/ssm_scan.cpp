// The Mamba-2 recurrence (arXiv 2405.21060) in its sequential form, for prompts and decode alike. A few state rows of
// one head stay in registers over a tile of tokens; between tiles the state lies in its slot, so cutting a prompt
// anywhere changes nothing: in fp32, or rounded to fp16 after every token. Work items are (row, head, slice of P) and
// share nothing.
#include <algorithm>
#include <type_traits>

#include "core/state_rounding.h"
#include "cpu/element.h"
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/variants.h"

namespace headway::cpu::HEADWAY_SIMD {
namespace {

constexpr int kTileTokens = 16;
constexpr int kMaxState = 512;
constexpr int kMaxDots =
    256;  // products S C of a block of state rows and a tile's tokens, before their lanes are summed
constexpr int kHalfRows = 16;  // state rows that are widened at once where slots hold fp16
constexpr int kRegisters = kLanes == 16 ? 16 : 8;  // of the register file, for the state

alignas(64) constexpr float kZeros[kMaxState] = {};  // the state of a row that starts afresh

// An element of a slot that holds fp16.
struct Half {
  uint16_t bits;
};

// What the tokens of a tile bring to one head.
struct Tile {
  int num_tokens;
  alignas(64) float dt[kTileTokens];
  alignas(64) float decay[kTileTokens];          // exp(A dt)
  alignas(64) float b[kTileTokens * kMaxState];  // rows padded to whole vectors with zeros
  alignas(64) float c[kTileTokens * kMaxState];
};

template <class T>
void widen(const T* source, int64_t size, float* target) {
  for (int64_t i = 0; i < size; i += kLanes) store(target + i, load_part(source + i, size - i));
}

template <class T>
void load_tile(const SsmScanParams& params, int64_t head, int64_t token, int count, int padded, Tile& tile) {
  tile.num_tokens = count;
  const int64_t group = head / (params.num_heads / params.num_groups) * params.state_size;
  for (int t = 0; t < count; ++t) {
    widen(as<T>(params.B) + (token + t) * params.b_stride + group, params.state_size, tile.b + t * padded);
    widen(as<T>(params.C) + (token + t) * params.c_stride + group, params.state_size, tile.c + t * padded);
    tile.dt[t] = to_float(as<T>(params.dt)[(token + t) * params.dt_stride + head]) + params.dt_bias[head];
  }
  for (int t = 0; t < count; t += kLanes) {
    F32 dt = softplus(load_part(tile.dt + t, count - t));
    dt = min(max(dt, broadcast(params.dt_min)), broadcast(params.dt_max));
    store_part(tile.decay + t, exp(dt * params.A[head]), count - t);
    store_part(tile.dt + t, dt, count - t);
  }
}

// A block of state rows of one head, their inflow and their outputs over a tile.
struct Block {
  const float* source;  // [rows, N]; null: zeros
  float* target;        // [rows, N]; may be source
  int num_rows;
  float inflow[kMaxDots];  // [tokens, rows] dt * x
  F32 dots[kMaxDots];      // [tokens, rows] S C by lane
};

// Rows first .. first + kRows of the block, kVectors * kLanes = N.
template <int kVectors, int kRows>
void scan_rows(const Tile& tile, Block& block, int first) {
  constexpr int kState = kVectors * kLanes;
  F32 s[kRows][kVectors];
  const float* source = block.source == nullptr ? kZeros : block.source + first * kState;
  const int source_stride = block.source == nullptr ? 0 : kState;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) s[r][j] = load(source + r * source_stride + j * kLanes);
  }
  const float* inflow = block.inflow + first;
  F32* dots = block.dots + first;
  for (int t = 0; t < tile.num_tokens; ++t) {
    const float* b = tile.b + t * kState;
    const float* c = tile.c + t * kState;
    const F32 decay = broadcast(tile.decay[t]);
    F32 sums[kRows];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        s[r][j] = fma(broadcast(inflow[r]), load(b + j * kLanes), s[r][j] * decay);
        sums[r] = j == 0 ? s[r][j] * load(c) : fma(s[r][j], load(c + j * kLanes), sums[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) dots[r] = sums[r];
    inflow += block.num_rows;
    dots += block.num_rows;
  }
  float* target = block.target + first * kState;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) store(target + r * kState + j * kLanes, s[r][j]);
  }
}

template <int kVectors>
void scan_block(const Tile& tile, Block& block) {
  constexpr int kRows = std::clamp(kRegisters / kVectors, 1, 8);
  int row = 0;
  for (; row + kRows <= block.num_rows; row += kRows) scan_rows<kVectors, kRows>(tile, block, row);
  for (; row < block.num_rows; ++row) scan_rows<kVectors, 1>(tile, block, row);
}

// Any N up to kMaxState: one row at a time, its state in L1.
void scan_block_any(const Tile& tile, Block& block, int state_size, int padded) {
  F32 s[kMaxState / kLanes];
  const int num_vectors = padded / kLanes;
  for (int row = 0; row < block.num_rows; ++row) {
    for (int j = 0; j < num_vectors; ++j) {
      const int part = state_size - j * kLanes;
      s[j] = block.source == nullptr ? F32{} : load_part(block.source + row * state_size + j * kLanes, part);
    }
    for (int t = 0; t < tile.num_tokens; ++t) {
      const F32 inflow = broadcast(block.inflow[t * block.num_rows + row]);
      F32 dots{};
      for (int j = 0; j < num_vectors; ++j) {
        s[j] = fma(inflow, load(tile.b + t * padded + j * kLanes), s[j] * tile.decay[t]);
        dots = fma(s[j], load(tile.c + t * padded + j * kLanes), dots);
      }
      block.dots[t * block.num_rows + row] = dots;
    }
    for (int j = 0; j < num_vectors; ++j) {
      store_part(block.target + row * state_size + j * kLanes, s[j], state_size - j * kLanes);
    }
  }
}

void scan_block_of_size(const Tile& tile, Block& block, int state_size, int padded) {
  if (state_size == padded) {
    switch (padded / kLanes) {
      case 1:
        return scan_block<1>(tile, block);
      case 2:
        return scan_block<2>(tile, block);
      case 4:
        return scan_block<4>(tile, block);
      case 8:
        return scan_block<8>(tile, block);
      case 16:
        return scan_block<16>(tile, block);
      default:
        break;
    }
  }
  scan_block_any(tile, block, state_size, padded);
}

// One (row, head, slice of P).
struct Item {
  int64_t row;
  int64_t head;
  int channel_begin;
  int channel_end;
};

// y = the lanes' sums + D x, of a scanned block.
template <class T>
void store_outputs(const SsmScanParams& params, int64_t head, int64_t head_channel, int64_t token, int num_tokens,
                   Block& block) {
  const float skip = params.D[head];
  const int num_dots = num_tokens * block.num_rows;
  alignas(64) float y[kMaxDots];
  for (int i = num_dots; i % kLanes != 0; ++i) block.dots[i] = F32{};
  for (int i = 0; i < num_dots; i += kLanes) store(y + i, reduce_add_each(block.dots + i));
  const int64_t token_size = int64_t{params.num_heads} * params.head_dim;
  const T* x = as<T>(params.x) + token * params.x_stride + head_channel;
  T* out = as<T>(params.out) + token * token_size + head_channel;
  for (int t = 0; t < num_tokens; ++t) {
    for (int i = 0; i < block.num_rows; i += kLanes) {
      const int part = block.num_rows - i;
      const F32 sum = load_part(y + t * block.num_rows + i, part);
      const F32 value = fma(load_part(x + t * params.x_stride + i, part), broadcast(skip), sum);
      store_part(out + t * token_size + i, value, part);
    }
  }
}

// Scans a block whose rows lie at `source` and go to `target`, [rows, N]; null: zeros. `position` is what they have
// seen after the tile, `element` their place in the slot.
void scan_block_of(const Tile& tile, Block& block, const float* source, float* target, int state_size, int padded,
                   int32_t, int64_t) {
  block.source = source;
  block.target = target;
  scan_block_of_size(tile, block, state_size, padded);
}
void scan_block_of(const Tile& tile, Block& block, const Half* source, Half* target, int state_size, int padded,
                   int32_t position, int64_t element) {
  alignas(64) float wide[kHalfRows * kMaxState];
  const int size = block.num_rows * state_size;
  for (int i = 0; source != nullptr && i < size; ++i) wide[i] = widen_state(source[i].bits);
  block.source = source == nullptr ? nullptr : wide;
  block.target = wide;
  scan_block_of_size(tile, block, state_size, padded);
  const StateRounding rounding(position);
  for (int i = 0; i < size; ++i) {
    target[i] = {round_state(wide[i], rounding.bits(static_cast<uint32_t>(element + i)))};
  }
}

// source, target: the head's, [P, N]. S is float, or Half, whose tiles are single tokens.
template <class T, class S>
void scan_tile(const SsmScanParams& params, const Item& item, const Tile& tile, int64_t token, int padded,
               const S* source, S* target) {
  const int most_rows = std::is_same_v<S, Half> ? kHalfRows : kMaxDots;
  const int rows_a_block = std::min(most_rows, std::max(1, kMaxDots / tile.num_tokens));
  const int64_t position = params.rows.row_start[item.row] + token - params.rows.query_start[item.row];
  Block block;
  for (int channel = item.channel_begin; channel < item.channel_end; channel += rows_a_block) {
    block.num_rows = std::min(rows_a_block, item.channel_end - channel);
    const int64_t head_channel = item.head * params.head_dim + channel;
    const int64_t offset = int64_t{channel} * params.state_size;
    const T* x = as<T>(params.x) + token * params.x_stride + head_channel;
    for (int t = 0; t < tile.num_tokens; ++t) {
      for (int i = 0; i < block.num_rows; ++i) {
        block.inflow[t * block.num_rows + i] = tile.dt[t] * to_float(x[t * params.x_stride + i]);
      }
    }
    scan_block_of(tile, block, source == nullptr ? nullptr : source + offset, target + offset, params.state_size,
                  padded, static_cast<int32_t>(position) + tile.num_tokens, head_channel * params.state_size);
    store_outputs<T>(params, item.head, head_channel, token, tile.num_tokens, block);
  }
}

// The row's snapshots, one after the other: flat indices of the tokens they are taken before, and slots.
class SnapshotCursor {
 public:
  SnapshotCursor(const SsmScanParams& params, int64_t row)
      : list_(params.snapshots), origin_(params.rows.query_start[row] - int64_t{params.rows.row_start[row]}) {
    if (list_.starts == nullptr) return;
    next_ = list_.starts[row];
    end_ = list_.starts[row + 1];
    while (token() <= params.rows.query_start[row]) advance();  // or the scan would not move
  }
  int64_t token() const { return next_ < end_ ? origin_ + list_.positions[next_] : INT64_MAX; }
  int32_t slot() const { return list_.slots[next_]; }
  void advance() { ++next_; }

 private:
  const SnapshotList& list_;
  int64_t origin_;
  int32_t next_ = 0;
  int32_t end_ = 0;
};

// The item's channels of a head's state, from one slot to another; null: zeros.
template <class S>
void copy_state(const SsmScanParams& params, const Item& item, const S* source, S* target) {
  const int64_t offset = int64_t{item.channel_begin} * params.state_size;
  const int64_t size = int64_t{item.channel_end - item.channel_begin} * params.state_size;
  if (source == nullptr) {
    std::fill_n(target + offset, size, S{});
  } else {
    std::copy_n(source + offset, size, target + offset);
  }
}

template <class T, class S>
void scan_item(const SsmScanParams& params, const Item& item) {
  const int64_t begin = params.rows.query_start[item.row];
  const int64_t end = params.rows.query_start[item.row + 1];
  const int64_t head_offset = item.head * params.head_dim * params.state_size;
  const int tile_tokens = std::is_same_v<S, Half> ? 1 : kTileTokens;
  S* slots = as<S>(params.state) + head_offset;
  const S* source = slots + params.read_slots[item.row] * params.state_stride;
  S* target = slots + params.write_slots[item.row] * params.state_stride;
  if (params.rows.row_start[item.row] == 0) source = nullptr;
  if (begin == end && source != target) copy_state<S>(params, item, source, target);
  const int padded = (params.state_size + kLanes - 1) / kLanes * kLanes;
  SnapshotCursor snapshot(params, item.row);
  Tile tile;
  for (int64_t token = begin; token < end; token += tile.num_tokens) {
    const int64_t tile_end = std::min({token + tile_tokens, end, snapshot.token()});
    load_tile<T>(params, item.head, token, static_cast<int>(tile_end - token), padded, tile);
    scan_tile<T>(params, item, tile, token, padded, source, target);
    source = target;
    for (; snapshot.token() == tile_end; snapshot.advance()) {
      copy_state<S>(params, item, target, slots + snapshot.slot() * params.state_stride);
    }
  }
}

// Slices of P so that few rows and heads still occupy all threads.
int slice_channels(const SsmScanParams& params) {
  const int64_t pairs = int64_t{params.rows.num_rows} * params.num_heads;
  const int64_t wanted = std::max<int64_t>(1, 4 * num_threads() / std::max<int64_t>(1, pairs));
  const int64_t channels = (params.head_dim + wanted - 1) / wanted;
  return static_cast<int>(std::max<int64_t>(16, (channels + 15) / 16 * 16));
}

}  // namespace

void ssm_scan(const SsmScanParams& params) {
  if (params.state_size > kMaxState) throw std::invalid_argument("ssm_scan: the state size must be at most 512");
  const int channels = slice_channels(params);
  const int64_t num_slices = (params.head_dim + channels - 1) / channels;
  const int64_t num_items = int64_t{params.rows.num_rows} * params.num_heads * num_slices;
  const int64_t state_elements = int64_t{params.num_heads} * params.head_dim * params.state_size;
  with_element(params.dtype, [&]<class T>(T) {
    parallel_for(num_items, (params.num_tokens + params.rows.num_rows) * state_elements, [&](int64_t index) {
      const int begin = static_cast<int>(index % num_slices) * channels;
      const int64_t pair = index / num_slices;
      const Item item{pair / params.num_heads, pair % params.num_heads, begin,
                      std::min(begin + channels, params.head_dim)};
      if (params.state_dtype == DType::kFloat16) {
        scan_item<T, Half>(params, item);
      } else {
        scan_item<T, float>(params, item);
      }
    });
  });
}

}  // namespace headway::cpu::HEADWAY_SIMD
