// A Mamba-2 mixer's decode step over slot windows, in three chained launches: the new tokens' inputs
// (mamba_decode_inputs.cu), the state, gate and norm.
//
// A warp of the second launch owns 16 (N = 256: 8) channels of a row. Their state, which no other kernel of the step
// touches, is on its way to registers before the first launch is over; it goes back only when the window's base moves.
// The rest of a warp's needs it loads at once: C, the weights of the inputs since the base, and their x.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/ops.h"
#include "cuda/state_window.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "mamba_decode";
constexpr int kTaps = 4;
constexpr int kMinBlocks = 4;  // a multiprocessor: 16 warps with 8 KB of state each under way

// A warp's channels, all of one head.
struct WarpChannels {
  int first;  // of H * P
  int head;
  int group;
};

// y of new tokens i .. i + count - 1, which share the canonical base `base` that the state is at.
template <typename T, int kN>
__device__ __forceinline__ void read_out(const MambaDecodeParams& params, const SlotRow& row,
                                         const WarpChannels& channels, const StateRows<kN, true>& state, int base,
                                         int i, int count) {
  constexpr int kRows = ScanLayout<kN>::kWarpRows;
  constexpr int kParts = kWarpSize / kRows;  // lanes that share a channel's inputs
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int part = lane / kRows;
  const int64_t channel = channels.first + lane % kRows;
  const int num_inputs = row.start + i + count - base;

  float x[kMaxWindow / kParts];
  int entry = base % params.log.num_entries + part;
#pragma unroll
  for (int k = 0; k < kMaxWindow / kParts; ++k, entry += kParts) {
    if (entry >= params.log.num_entries) entry -= params.log.num_entries;
    x[k] = 0.0f;
    if (part + k * kParts < num_inputs) x[k] = to_float(*log_column<T>(params, row.slot, entry, channel));
  }
  const float D = params.D[channels.head];
  const T* C = static_cast<const T*>(params.convolved) + inner_channels(params) + group_states(params) +
               static_cast<int64_t>(channels.group) * kN;
  for (const int end = i + count; i < end; ++i) {
    const int64_t token = row.token + i;
    LaneStates<T, kN> queries;
    queries.load(C + token * conv_channels(params));
    const float* table = params.table + (token * params.num_heads + channels.head) * kTableWidth;
    const float weight = lane < kTableWidth ? table[lane] : 0.0f;
    const float own = to_float(*log_column<T>(params, row.slot, (row.start + i) % params.log.num_entries, channel));
    const float dot = state_dot<T, kN>(state, queries);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kMaxWindow / kParts; ++k) {
      sum = fmaf(__shfl_sync(kFullWarp, weight, 1 + part + k * kParts), x[k], sum);
    }
#pragma unroll
    for (int offset = kRows; offset < kWarpSize; offset *= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
    const float y = fmaf(D, own, fmaf(__shfl_sync(kFullWarp, weight, 0), dot, sum));
    if (lane < kRows) static_cast<T*>(params.scanned)[token * inner_channels(params) + channel] = from_float<T>(y);
  }
}

template <typename T, int kN>
__device__ __forceinline__ void clear_outputs(const MambaDecodeParams& params, const SlotRow& row, int first_channel) {
  constexpr int kRows = ScanLayout<kN>::kWarpRows;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  T* out = static_cast<T*>(params.scanned) + row.token * inner_channels(params) + first_channel + lane;
  for (int i = 0; i < row.num_tokens; ++i) {
    if (lane < kRows) out[i * inner_channels(params)] = from_float<T>(0.0f);
  }
}

template <typename T, int kN>
__global__ void __launch_bounds__(kFoldWarps* kWarpSize, kMinBlocks)
    decode_state_kernel(MambaDecodeParams params, int blocks_a_row) {
  using L = ScanLayout<kN>;
  __shared__ FoldMemory<kN> memory;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int row_idx = static_cast<int>(blockIdx.x) / blocks_a_row;
  const int num_channels = static_cast<int>(blockDim.x) / kWarpSize * L::kWarpRows;
  const int first_channel = static_cast<int>(blockIdx.x) % blocks_a_row * num_channels;
  WarpChannels channels{};
  channels.first = first_channel + warp * L::kWarpRows;
  channels.head = channels.first / params.head_dim;
  channels.group = channels.head / (params.num_heads / params.num_groups);

  // What the launch before does not write: the row and its state.
  const SlotRow row(params, row_idx);
  float* slot_state = params.ssm_state + row.slot * params.ssm_state_stride + static_cast<int64_t>(channels.first) * kN;
  StateRows<kN, true> state;
  state.clear();
  if (row.base > 0 && !row.is_padding()) load_state<kN>(state, slot_state);
  wait_for_previous_kernel();
  allow_next_kernel();
  if (row.is_padding()) {
    clear_outputs<T, kN>(params, row, channels.first);
    return;
  }

  // From one canonical base to the next, and the tokens between.
  int base = row.base;
  for (int i = 0; i < row.num_tokens;) {
    const int position = row.start + i;
    if (base < row.canonical(position)) {
      const int end = base / kMaxWindow * kMaxWindow + kMaxWindow;
      stage_stretch<T, kN>(params, row.slot, channels.group, first_channel, num_channels, base, end - base, memory);
      const Stretch stretch = logged_stretch<T>(params, row.slot, channels.head, base, end - base);
      fold_stretch<kN>(state, stretch, end - base, memory.B[0], &memory.x[0][warp * L::kWarpRows],
                       FoldMemory<kN>::kChannels);
      base = end;
      if (base == row.next_base) store_state<kN>(state, slot_state);
      continue;
    }
    const int count = min(row.num_tokens - i, position / kMaxWindow * kMaxWindow + kMaxWindow - position);
    read_out<T, kN>(params, row, channels, state, base, i, count);
    i += count;
  }
}

template <typename T, int kN>
void launch_state(const MambaDecodeParams& params, cudaStream_t stream) {
  constexpr int kRows = ScanLayout<kN>::kWarpRows;
  require(params.head_dim % kRows == 0, kOp,
          "head_dim is " + std::to_string(params.head_dim) + "; expected a multiple of " + std::to_string(kRows));
  // Blocks tile a group, so that they fold one B; single warps while that leaves multiprocessors idle.
  const int group_warps = params.num_heads / params.num_groups * params.head_dim / kRows;
  const int64_t all_warps = static_cast<int64_t>(params.rows.num_rows) * params.num_groups * group_warps;
  const int wanted = all_warps >= 4096 ? kFoldWarps : all_warps >= 1024 ? 2 : 1;
  int warps = 1;
  for (int count = 2; count <= wanted; ++count) {
    if (group_warps % count == 0) warps = count;
  }
  const int64_t num_blocks = all_warps / warps;
  require(num_blocks <= INT32_MAX, kOp, "num_rows * num_heads is too large for one launch");
  launch_chained(kOp, decode_state_kernel<T, kN>, dim3(static_cast<unsigned>(num_blocks)), warps * kWarpSize, stream,
                 params, params.num_groups * group_warps / warps);
}

template <typename T>
void launch_state_size(const MambaDecodeParams& params, cudaStream_t stream) {
  if (params.state_size == 64) return launch_state<T, 64>(params, stream);
  if (params.state_size == 128) return launch_state<T, 128>(params, stream);
  launch_state<T, 256>(params, stream);
}

template <typename T>
bool is_aligned(const MambaDecodeParams& params) {
  const int64_t d_inner = static_cast<int64_t>(params.num_heads) * params.head_dim;
  const int64_t states = static_cast<int64_t>(params.num_groups) * params.state_size;
  const int64_t conv_dim = d_inner + 2 * states;
  return is_vectorisable<T>(params.columns, params.token_stride, conv_dim) &&
         is_vectorisable<T>(params.conv_weight, conv_dim, conv_dim) &&
         is_vectorisable<T>(params.conv_bias, conv_dim, conv_dim) &&
         is_vectorisable<T>(params.conv_state, params.conv_state_stride, conv_dim) &&
         is_vectorisable<T>(params.log.raw, params.log.raw_stride, conv_dim) &&
         is_vectorisable<T>(params.log.columns, params.log.columns_stride, d_inner + states) &&
         is_vectorisable<T>(params.convolved, conv_dim, conv_dim) &&
         is_vectorisable<float>(params.ssm_state, params.ssm_state_stride, params.state_size);
}

void require_log(const MambaDecodeParams& params) {
  const StateLogParams& log = params.log;
  require(log.window == kMaxWindow, kOp, "window is " + std::to_string(log.window) + "; expected 16");
  require(params.max_query_len <= kMaxQuery, kOp, "max_query_len exceeds 8");
  require(log.max_rewind >= std::max(1, params.max_query_len - 1), kOp, "max_rewind must cover a row's new tokens");
  require(log.num_entries >= log.window + log.max_rewind + params.max_query_len, kOp,
          "the log must have window + max_rewind + max_query_len entries");
  require(log.num_raw >= log.max_rewind + params.max_query_len + kTaps - 1, kOp,
          "the log must have max_rewind + max_query_len + 3 raw columns");
}

}  // namespace

void mamba_decode(const MambaDecodeParams& params, Stream stream) {
  if (params.rows.num_rows == 0 || params.num_tokens == 0) return;
  require(params.width == kTaps, kOp, "width is " + std::to_string(params.width) + "; expected 4");
  require(params.num_groups > 0 && params.num_heads % params.num_groups == 0, kOp, "num_groups must divide num_heads");
  require_log(params);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    require(is_aligned<T>(params), kOp, "every tensor and its strides must be multiples of 16 bytes");
    launch_decode_inputs(params, cuda_stream);
    launch_state_size<T>(params, cuda_stream);
  });
  gated_rms_norm({.num_tokens = params.num_tokens,
                  .hidden = static_cast<int64_t>(params.num_heads) * params.head_dim,
                  .group_size = params.norm_group_size,
                  .y = params.scanned,
                  .z = params.z,
                  .z_stride = params.token_stride,
                  .weight = params.norm_weight,
                  .out = params.out,
                  .eps = params.norm_eps,
                  .dtype = params.dtype},
                 stream);
}

}  // namespace headway::cuda
