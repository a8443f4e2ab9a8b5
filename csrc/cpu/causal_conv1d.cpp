// Depthwise causal convolution with silu over ragged rows, vectorised over channels.
#include <algorithm>

#include "cpu/element.h"
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/variants.h"

namespace headway::cpu::HEADWAY_SIMD {
namespace {

constexpr int64_t kBlockChannels = 256;

// One row's columns for a block of channels: W - 1 of the past (null: zeros), then this step's.
template <class T>
struct Columns {
  const T* past;
  int64_t past_stride;
  const T* now;
  int64_t now_stride;
  int64_t num_past;

  // Column i of past and now together; null stands for zeros.
  const T* at(int64_t i) const {
    if (i >= num_past) return now + (i - num_past) * now_stride;
    return past == nullptr ? nullptr : past + i * past_stride;
  }
};

template <class T, int kWidth>
void convolve_token(const CausalConv1dParams& params, const Columns<T>& columns, int64_t token, int64_t channel,
                    int64_t count, T* out) {
  const T* taps[kWidth];
  for (int tap = 0; tap < kWidth; ++tap) taps[tap] = columns.at(token + tap);
  const T* weight = as<T>(params.weight) + channel;
  const T* bias = params.bias == nullptr ? nullptr : as<T>(params.bias) + channel;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t part = count - i;
    F32 sum = bias == nullptr ? F32{} : load_part(bias + i, part);
    for (int tap = 0; tap < kWidth; ++tap) {
      const F32 value = taps[tap] == nullptr ? F32{} : load_part(taps[tap] + i, part);
      sum = fma(value, load_part(weight + tap * params.num_channels + i, part), sum);
    }
    store_part(out + i, silu(sum), part);
  }
}

// Leaves the last W - 1 columns in the write slot. Ascending order: in place, a column only moves towards the front.
template <class T>
void keep_last_columns(const Columns<T>& columns, int64_t num_tokens, int64_t count, T* target, int64_t stride) {
  for (int64_t i = 0; i < columns.num_past; ++i) {
    const T* source = columns.at(num_tokens + i);
    T* column = target + i * stride;
    if (source == nullptr) {
      std::memset(column, 0, static_cast<size_t>(count) * sizeof(T));
    } else if (source != column) {
      std::memcpy(column, source, static_cast<size_t>(count) * sizeof(T));
    }
  }
}

template <class T, int kWidth>
void convolve_block(const CausalConv1dParams& params, int64_t row, int64_t channel) {
  const int64_t count = std::min(kBlockChannels, params.num_channels - channel);
  const int64_t begin = params.rows.query_start[row];
  const int64_t num_tokens = params.rows.query_start[row + 1] - begin;
  T* state = as<T>(params.state) + channel;
  const T* past = state + params.read_slots[row] * params.state_stride;
  const Columns<T> columns{params.rows.row_start[row] > 0 ? past : nullptr, params.num_channels,
                           as<T>(params.x) + begin * params.x_stride + channel, params.x_stride, kWidth - 1};
  T* out = as<T>(params.out) + begin * params.num_channels + channel;
  for (int64_t token = 0; token < num_tokens; ++token) {
    convolve_token<T, kWidth>(params, columns, token, channel, count, out + token * params.num_channels);
  }
  const auto keep = [&](int64_t num_seen, int32_t slot) {
    keep_last_columns(columns, num_seen, count, state + slot * params.state_stride, params.num_channels);
  };
  const SnapshotList& snapshots = params.snapshots;
  if (snapshots.starts != nullptr) {
    for (int32_t i = snapshots.starts[row]; i < snapshots.starts[row + 1]; ++i) {
      keep(snapshots.positions[i] - params.rows.row_start[row], snapshots.slots[i]);
    }
  }
  keep(num_tokens, params.write_slots[row]);  // last: it may overwrite the past in place
}

template <class T, int kWidth>
void convolve(const CausalConv1dParams& params) {
  constexpr int64_t kCostOfSilu = 8;
  const int64_t num_blocks = (params.num_channels + kBlockChannels - 1) / kBlockChannels;
  const int64_t cost = (params.num_tokens + params.rows.num_rows) * params.num_channels * kCostOfSilu;
  parallel_for(params.rows.num_rows * num_blocks, cost, [&](int64_t item) {
    convolve_block<T, kWidth>(params, item / num_blocks, item % num_blocks * kBlockChannels);
  });
}

}  // namespace

void causal_conv1d(const CausalConv1dParams& params) {
  with_element(params.dtype, [&]<class T>(T) {
    switch (params.width) {
      case 2:
        return convolve<T, 2>(params);
      case 3:
        return convolve<T, 3>(params);
      case 4:
        return convolve<T, 4>(params);
      default:
        throw std::invalid_argument("causal_conv1d: width must be 2, 3 or 4");
    }
  });
}

}  // namespace headway::cpu::HEADWAY_SIMD
