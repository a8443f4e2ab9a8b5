// Moves states over slot windows, with their logs folded in: one layer a launch, only in steps that bring copies. One
// warp a block: 16 channels of a state, or 32 columns of the convolution.
#include "cuda/ops.h"
#include "cuda/state_window.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "fold_states";
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

template <typename T, int kN>
__global__ void __launch_bounds__(kWarpSize) fold_states_kernel(FoldStatesParams params, int num_tiles) {
  __shared__ StateStage<T, kN> stage;
  const StateCopy copy = params.copies[blockIdx.y];
  const int base = params.state_base[copy.src_slot];
  const int block = static_cast<int>(blockIdx.x);
  if (copy.src_slot == copy.dst_slot && copy.position == base) return;
  if (block >= num_tiles) {
    move_columns<T>(params, copy, base, static_cast<int64_t>(block - num_tiles) * kWarpSize + threadIdx.x);
    return;
  }

  const StateChannels channels(params, copy.src_slot, block);
  stage.copy_state(params, channels, base > 0);
  StateTile<kN> state;
  for (int begin = base;;) {
    const int end = min(copy.position, window_end(begin));
    stage.copy_x(params, channels, begin, end - begin);
    stage.copy_B(params, channels, begin, end - begin);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    if (begin == base) state.load(stage.state);
    if (begin == end) break;
    const T raw_dt = load_raw_dt<T>(params, channels, begin, end - begin);
    const FoldWeights weights(params, channels.head, raw_dt, end - begin);
    state.fold(weights.decay, weights.input, stage.x, stage.B);
    __syncwarp();
    begin = end;
  }
  state.store(params.ssm_state + copy.dst_slot * params.ssm_state_stride + static_cast<int64_t>(channels.first) * kN);
}

template <typename T, int kN>
void launch(const FoldStatesParams& params, cudaStream_t stream) {
  require(params.head_dim % kTileChannels == 0, kOp, "head_dim must be a multiple of 16");
  const int num_tiles = params.num_heads * params.head_dim / kTileChannels;
  const int conv_dim = params.num_heads * params.head_dim + 2 * params.num_groups * params.state_size;
  const int column_blocks = (conv_dim + kWarpSize - 1) / kWarpSize;
  require(params.num_copies <= 65535, kOp, "too many copies for one launch");
  const dim3 grid(static_cast<unsigned>(num_tiles + column_blocks), static_cast<unsigned>(params.num_copies));
  fold_states_kernel<T, kN><<<grid, kWarpSize, 0, stream>>>(params, num_tiles);
  check_launch(kOp);
}

}  // namespace

void fold_states(const FoldStatesParams& params, Stream stream) {
  if (params.num_copies == 0) return;
  require(params.log.window == kMaxWindow, kOp, "window is " + std::to_string(params.log.window) + "; expected 16");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (params.state_size == 64) return launch<T, 64>(params, cuda_stream);
    if (params.state_size == 128) return launch<T, 128>(params, cuda_stream);
    if (params.state_size == 256) return launch<T, 256>(params, cuda_stream);
    require(false, kOp, "state_size is " + std::to_string(params.state_size) + "; expected 64, 128 or 256");
  });
}

}  // namespace headway::cuda
