// Moves states over slot windows, with their logs folded in: one layer a launch, only in steps that bring copies.
#include "cuda/ops.h"
#include "cuda/state_fold.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "fold_states";
constexpr int kThreads = kFoldWarps * kWarpSize;
constexpr int kPastColumns = 3;

// A thread's channel of the convolution: its last columns before the copy's position.
template <typename T>
__device__ __forceinline__ void move_columns(const FoldStatesParams& params, const StateCopy& copy, int base,
                                             int64_t channel) {
  const int64_t conv_dim = conv_channels(params);
  if (channel >= conv_dim) return;
  T* states = static_cast<T*>(params.conv_state) + channel;
  const T* ring = static_cast<const T*>(params.log.raw) + copy.src_slot * params.log.raw_stride + channel;
  for (int tap = 0; tap < kPastColumns; ++tap) {
    const int position = copy.position - kPastColumns + tap;
    T column = from_float<T>(0.0f);
    if (copy.position == base) {
      column = states[copy.src_slot * params.conv_state_stride + tap * conv_dim];
    } else if (position >= 0) {
      column = ring[position % params.log.num_raw * conv_dim];
    }
    states[copy.dst_slot * params.conv_state_stride + tap * conv_dim] = column;
  }
}

template <typename T, int kN, typename State>
__global__ void __launch_bounds__(kThreads) fold_states_kernel(FoldStatesParams params, int state_blocks) {
  __shared__ FoldMemory<T, kN> memory;
  const StateCopy copy = params.copies[blockIdx.y];
  const int base = params.state_base[copy.src_slot];
  const int block = static_cast<int>(blockIdx.x);
  if (copy.src_slot == copy.dst_slot && copy.position == base) return;
  if (block >= state_blocks) {
    move_columns<T>(params, copy, base, static_cast<int64_t>(block - state_blocks) * blockDim.x + threadIdx.x);
    return;
  }

  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int first = (block * num_warps + static_cast<int>(threadIdx.x) / kWarpSize) * kTileChannels;
  const int head = first / params.head_dim;
  const StateChannels channels{copy.src_slot, first, head, head / (params.num_heads / params.num_groups)};
  const int64_t offset = static_cast<int64_t>(channels.first) * kN;
  StateTile<kN> state;
  state.clear();
  State* states = static_cast<State*>(params.ssm_state) + offset;
  if (base > 0) state.load(states + copy.src_slot * params.ssm_state_stride);
  for (int begin = base; begin < copy.position;) {
    const int end = min(copy.position, window_end(begin));
    if (begin > base) __syncthreads();  // B is folded
    const StretchFold fold(params, channels, begin, end - begin, memory);
    fold.copy();
    fold.apply(state);
    round_state_at<State>(state, channels, end);
    begin = end;
  }
  state.store(states + copy.dst_slot * params.ssm_state_stride);
}

template <typename T, int kN, typename State>
void launch(const FoldStatesParams& params, cudaStream_t stream) {
  require(params.head_dim % kTileChannels == 0, kOp, "head_dim must be a multiple of 16");
  const int group_tiles = params.num_heads / params.num_groups * (params.head_dim / kTileChannels);
  const int warps = choose_fold_warps(group_tiles, kFoldWarps);
  const int state_blocks = params.num_groups * group_tiles / warps;
  const int conv_dim = params.num_heads * params.head_dim + 2 * params.num_groups * params.state_size;
  const int num_threads = warps * kWarpSize;
  const int column_blocks = (conv_dim + num_threads - 1) / num_threads;
  require(params.num_copies <= 65535, kOp, "too many copies for one launch");
  const dim3 grid(static_cast<unsigned>(state_blocks + column_blocks), static_cast<unsigned>(params.num_copies));
  fold_states_kernel<T, kN, State><<<grid, num_threads, 0, stream>>>(params, state_blocks);
  check_launch(kOp);
}

}  // namespace

void fold_states(const FoldStatesParams& params, Stream stream) {
  if (params.num_copies == 0) return;
  require(params.log.window == kMaxWindow, kOp, "window is " + std::to_string(params.log.window) + "; expected 16");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_mixer(params, kOp, [&](auto tag, auto state_size, auto state) {
    launch<typename decltype(tag)::Type, decltype(state_size)::value, typename decltype(state)::Type>(params,
                                                                                                      cuda_stream);
  });
}

}  // namespace headway::cuda
