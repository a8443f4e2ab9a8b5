// A Mamba-2 mixer's decode step in one launch: convolution, state update, gate and grouped norm of one token a row.
//
// A team of blocks (a cluster, one block before sm_90) owns one row and one group: its heads are dealt to the blocks,
// each convolves its own channels and, again, the group's B and C, and streams its heads' state through registers once.
// The group's sum of squares meets in distributed shared memory, head by head in a fixed order, so the number of
// blocks, which depends on the batch, changes no bit. The state update is ssm_recurrence.cuh's, so neither does the
// choice of kernel.
//
// Slots may be updated in place: every state row and every x channel has one owner that reads before it writes; the
// conv state of B and C, which all blocks of a team read, is written by the first of them behind the team's barrier.
#include "cuda/common/cluster.cuh"
#include "cuda/common/math.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"
#include "cuda/ssm_recurrence.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "mamba_decode";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTaps = 4;  // of every published Mamba-2

// What a block keeps in shared memory; channel arrays hold its heads' channels.
struct Shared {
  TeamMemory* team;
  float* B;  // [N]
  float* C;  // [N]
  float* x;  // [heads * P]
  float* y;  // [heads * P] the scan's outputs, then gated
  float* gate;  // [heads * P] silu(z)
  float* dt;  // [heads]
  float* decay;  // [heads]
  float* squares;  // [heads] of the gated outputs, read by the whole team
};

__host__ __device__ constexpr size_t shared_bytes(int heads, int head_dim, int state_size) {
  return sizeof(TeamMemory) + (2 * state_size + 3 * heads * head_dim + 3 * heads) * sizeof(float);
}

__device__ __forceinline__ Shared carve_shared(unsigned char* bytes, int heads, int head_dim, int state_size) {
  auto* floats = reinterpret_cast<float*>(bytes + sizeof(TeamMemory));
  const int channels = heads * head_dim;
  Shared shared{reinterpret_cast<TeamMemory*>(bytes), floats, floats + state_size};
  shared.x = shared.C + state_size;
  shared.y = shared.x + channels;
  shared.gate = shared.y + channels;
  shared.dt = shared.gate + channels;
  shared.decay = shared.dt + heads;
  shared.squares = shared.decay + heads;
  return shared;
}

// A block's part of the step.
struct Share {
  int row;
  int group;
  int first_head;
  int num_heads;  // may be 0 at a team's end
  int heads_a_block;  // of the team's other blocks
  bool has_state;
  int32_t read_slot;
  int32_t write_slot;
};

// The last raw columns of one piece of channels, oldest first; the newest is this token's.
template <typename T>
struct Window {
  Vector<T, kVectorWidth<T>> columns[kTaps];

  __device__ __forceinline__ void load(const MambaDecodeParams& params, const Share& share, int64_t channel) {
    const int64_t conv_dim = conv_channels(params);
    const T* state = static_cast<const T*>(params.conv_state) + share.read_slot * params.conv_state_stride + channel;
    const T* raw = static_cast<const T*>(params.columns) + share.row * params.token_stride + channel;
#pragma unroll
    for (int tap = 0; tap < kTaps - 1; ++tap) {
      columns[tap] = {};
      if (share.has_state) columns[tap] = load_piece(state + tap * conv_dim);
    }
    columns[kTaps - 1] = load_piece(raw);
  }

  __device__ __forceinline__ void store(const MambaDecodeParams& params, const Share& share, int64_t channel) const {
    T* state = static_cast<T*>(params.conv_state) + share.write_slot * params.conv_state_stride + channel;
#pragma unroll
    for (int tap = 0; tap < kTaps - 1; ++tap) {
      *reinterpret_cast<Vector<T, kVectorWidth<T>>*>(state + tap * conv_channels(params)) = columns[tap + 1];
    }
  }

  // silu(bias + weight . window), rounded to T as the convolution's output is.
  __device__ __forceinline__ void filter(const MambaDecodeParams& params, int64_t channel, float* out) const {
    float sum[kVectorWidth<T>] = {};
    if (params.conv_bias != nullptr) load_floats(static_cast<const T*>(params.conv_bias) + channel, sum);
    const T* weights = static_cast<const T*>(params.conv_weight) + channel;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      float weight[kVectorWidth<T>];
      load_floats(weights + tap * conv_channels(params), weight);
#pragma unroll
      for (int i = 0; i < kVectorWidth<T>; ++i) sum[i] = fmaf(weight[i], to_float(columns[tap].values[i]), sum[i]);
    }
#pragma unroll
    for (int i = 0; i < kVectorWidth<T>; ++i) {
      out[i] = to_float(from_float<T>(sizeof(T) == 4 ? silu(sum[i]) : fast_silu(sum[i])));
    }
  }

  __device__ __forceinline__ static int64_t conv_channels(const MambaDecodeParams& params) {
    return static_cast<int64_t>(params.num_heads) * params.head_dim +
           2 * static_cast<int64_t>(params.num_groups) * params.state_size;
  }

  __device__ __forceinline__ static Vector<T, kVectorWidth<T>> load_piece(const T* source) {
    return *reinterpret_cast<const Vector<T, kVectorWidth<T>>*>(source);
  }
};

// Convolves the block's channels of x, whose state it owns, and prepares the gate.
template <typename T>
__device__ __forceinline__ void prepare_heads(const MambaDecodeParams& params, const Share& share, Shared& shared) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t first_channel = static_cast<int64_t>(share.first_head) * params.head_dim;
  const int num_channels = share.num_heads * params.head_dim;
  for (int c = static_cast<int>(threadIdx.x) * kWidth; c < num_channels; c += kThreads * kWidth) {
    Window<T> window;
    float gate[kWidth];
    window.load(params, share, first_channel + c);
    load_floats(static_cast<const T*>(params.z) + share.row * params.token_stride + first_channel + c, gate);
    window.filter(params, first_channel + c, shared.x + c);
    window.store(params, share, first_channel + c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) shared.gate[c + i] = sizeof(T) == 4 ? silu(gate[i]) : fast_silu(gate[i]);
  }
  for (int i = static_cast<int>(threadIdx.x); i < share.num_heads; i += kThreads) {
    const int head = share.first_head + i;
    const float raw = to_float(static_cast<const T*>(params.dt)[share.row * params.token_stride + head]);
    const float soft = softplus(raw + params.dt_bias[head]);
    shared.dt[i] = fminf(fmaxf(soft, params.dt_min), params.dt_max);
    shared.decay[i] = expf(params.A[head] * shared.dt[i]);
  }
}

// A thread's piece of the group's B and C: the block's last threads have one each.
template <typename T>
struct SharedColumns {
  int piece;  // < 0: none
  int64_t channel;
  Window<T> window;

  __device__ __forceinline__ SharedColumns(const MambaDecodeParams& params, const Share& share) {
    const int num_pieces = 2 * params.state_size / kVectorWidth<T>;
    piece = static_cast<int>(threadIdx.x) - (kThreads - num_pieces);
    if (piece < 0) return;
    const int n = piece * kVectorWidth<T>;
    const bool is_c = n >= params.state_size;
    const int64_t block = static_cast<int64_t>(is_c ? params.num_groups + share.group : share.group);
    channel = static_cast<int64_t>(params.num_heads) * params.head_dim + block * params.state_size +
              (is_c ? n - params.state_size : n);
    window.load(params, share, channel);
  }

  // C follows B in shared memory.
  __device__ __forceinline__ void filter(const MambaDecodeParams& params, const Shared& shared) const {
    if (piece >= 0) window.filter(params, channel, shared.B + piece * kVectorWidth<T>);
  }

  __device__ __forceinline__ void store(const MambaDecodeParams& params, const Share& share) const {
    if (piece >= 0) window.store(params, share, channel);
  }
};

// Strips of state rows, one warp each in turn: update, output, gate.
template <typename T, int kN>
__device__ __forceinline__ void update_state(const MambaDecodeParams& params, const Share& share, int strip,
                                             StateRows<kN, true>& state, Shared& shared) {
  constexpr int kRows = ScanLayout<kN>::kWarpRows;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int num_strips = share.num_heads * params.head_dim / kRows;
  const int64_t first_offset = static_cast<int64_t>(share.first_head) * params.head_dim * kN;
  const float* source = params.ssm_state + share.read_slot * params.ssm_state_stride + first_offset;
  float* target = params.ssm_state + share.write_slot * params.ssm_state_stride + first_offset;
  while (strip < num_strips) {
    const int first_row = strip * kRows;
    const int i = first_row / params.head_dim;
    float* y = shared.y + first_row;
    state.step(shared.B, shared.C, shared.x + first_row, shared.dt[i], shared.decay[i], params.D[share.first_head + i],
               kRows, y);
    state.store(target + static_cast<int64_t>(first_row) * kN, kRows, kN);
    __syncwarp();
    if (lane < kRows) y[lane] = to_float(from_float<T>(y[lane])) * shared.gate[first_row + lane];
    strip += kWarps;
    if (strip < num_strips && share.has_state) state.load(source + static_cast<int64_t>(strip) * kRows * kN, kRows, kN);
    if (!share.has_state) state.clear();
  }
}

// The group's sum of squares: heads across lanes, the same order whatever the team's size.
__device__ __forceinline__ float sum_squares(const Team& team, const Share& share, int heads_a_group,
                                             const float* squares) {
  float sum = 0.0f;
  for (int head = static_cast<int>(threadIdx.x) % kWarpSize; head < heads_a_group; head += kWarpSize) {
    sum += team.peer(squares, head / share.heads_a_block)[head % share.heads_a_block];
  }
  return warp_sum(sum);
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 2) mamba_decode_kernel(MambaDecodeParams params, int heads_a_block) {
  extern __shared__ __align__(16) unsigned char bytes[];
  Shared shared = carve_shared(bytes, heads_a_block, params.head_dim, kN);
  const Team team(*shared.team);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int heads_a_group = params.num_heads / params.num_groups;

  // Team -> (row, group), block -> heads.
  const int team_idx = static_cast<int>(blockIdx.x) / team.size();
  const int row = team_idx / params.num_groups;
  const int group = team_idx % params.num_groups;
  const int done_heads = min(team.rank() * heads_a_block, heads_a_group);
  const Share share{row,
                    group,
                    group * heads_a_group + done_heads,
                    min(heads_a_block, heads_a_group - done_heads),
                    heads_a_block,
                    params.row_start[row] > 0,
                    params.read_slots[row],
                    params.write_slots[row]};

  // The first strips of state are on their way while the channels are convolved.
  StateRows<kN, true> state;
  state.clear();
  constexpr int kStrip = ScanLayout<kN>::kWarpRows;
  if (share.has_state && warp * kStrip < share.num_heads * params.head_dim) {
    const int64_t first_p = static_cast<int64_t>(share.first_head) * params.head_dim + warp * kStrip;
    state.load(params.ssm_state + share.read_slot * params.ssm_state_stride + first_p * kN, kStrip, kN);
  }
  const SharedColumns<T> columns(params, share);
  columns.filter(params, shared);
  prepare_heads<T>(params, share, shared);
  __syncthreads();

  update_state<T, kN>(params, share, warp, state, shared);
  __syncthreads();

  for (int i = warp; i < share.num_heads; i += kWarps) {
    float sum = 0.0f;
    for (int p = lane; p < params.head_dim; p += kWarpSize) {
      const float y = shared.y[i * params.head_dim + p];
      sum = fmaf(y, y, sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) shared.squares[i] = sum;
  }
  team.sync();  // squares are there, and the whole team has read the group's conv state
  if (team.rank() == 0) columns.store(params, share);
  const float squares = sum_squares(team, share, heads_a_group, shared.squares);
  const float scale = rsqrtf(squares / static_cast<float>(heads_a_group * params.head_dim) + params.norm_eps);

  const int64_t first_channel = static_cast<int64_t>(share.first_head) * params.head_dim;
  T* out =
      static_cast<T*>(params.out) + row * (static_cast<int64_t>(params.num_heads) * params.head_dim) + first_channel;
  const T* weight = static_cast<const T*>(params.norm_weight) + first_channel;
  constexpr int kWidth = kVectorWidth<T>;
  for (int c = static_cast<int>(threadIdx.x) * kWidth; c < share.num_heads * params.head_dim; c += kThreads * kWidth) {
    float values[kWidth];
    load_floats(weight + c, values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] *= shared.y[c + i] * scale;
    store_floats(out + c, values);
  }
  team.sync();  // nobody leaves while its squares may be read
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), kOp);
  check(cudaDeviceGetAttribute(&value, attribute, device), kOp);
  return value;
}

// Blocks a team: enough blocks to fill the chip about four times over, at least one head each.
int choose_team_size(const MambaDecodeParams& params) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return 1;
  const int64_t wanted = 8 * static_cast<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount));
  const int64_t num_teams = static_cast<int64_t>(params.num_rows) * params.num_groups;
  const int heads_a_group = params.num_heads / params.num_groups;
  int size = 1;
  while (size < kMaxTeamBlocks && 2 * size <= heads_a_group && num_teams * size < wanted) size *= 2;
  return size;
}

template <typename T, int kN>
void launch(const MambaDecodeParams& params, cudaStream_t stream) {
  require(params.head_dim % ScanLayout<kN>::kWarpRows == 0, kOp,
          "head_dim is " + std::to_string(params.head_dim) + "; expected a multiple of " +
              std::to_string(ScanLayout<kN>::kWarpRows));
  const int team_size = choose_team_size(params);
  const int heads_a_group = params.num_heads / params.num_groups;
  const int heads_a_block = (heads_a_group + team_size - 1) / team_size;
  const size_t num_bytes = shared_bytes(heads_a_block, params.head_dim, kN);
  const auto kernel = mamba_decode_kernel<T, kN>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(num_bytes)), kOp);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(team_size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(params.num_rows * params.num_groups * team_size));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = num_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = team_size > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params, heads_a_block), kOp);
}

template <typename T>
void launch_state_size(const MambaDecodeParams& params, cudaStream_t stream) {
  const int64_t d_inner = static_cast<int64_t>(params.num_heads) * params.head_dim;
  const int64_t conv_dim = d_inner + 2 * static_cast<int64_t>(params.num_groups) * params.state_size;
  const bool is_aligned = is_vectorisable<T>(params.z, params.token_stride, d_inner) &&
                          is_vectorisable<T>(params.columns, params.token_stride, conv_dim) &&
                          is_vectorisable<T>(params.conv_weight, conv_dim, conv_dim) &&
                          is_vectorisable<T>(params.conv_bias, conv_dim, conv_dim) &&
                          is_vectorisable<T>(params.conv_state, params.conv_state_stride, conv_dim) &&
                          is_vectorisable<T>(params.norm_weight, d_inner, d_inner) &&
                          is_vectorisable<T>(params.out, d_inner, d_inner) &&
                          is_vectorisable<float>(params.ssm_state, params.ssm_state_stride, params.state_size);
  require(is_aligned, kOp, "every tensor and its strides must be multiples of 16 bytes");
  if (params.state_size == 64) return launch<T, 64>(params, stream);
  if (params.state_size == 128) return launch<T, 128>(params, stream);
  if (params.state_size == 256) return launch<T, 256>(params, stream);
  require(false, kOp, "state_size is " + std::to_string(params.state_size) + "; expected 64, 128 or 256");
}

}  // namespace

void mamba_decode(const MambaDecodeParams& params, Stream stream) {
  if (params.num_rows == 0) return;
  require(params.width == kTaps, kOp, "width is " + std::to_string(params.width) + "; expected 4");
  require(params.num_groups > 0 && params.num_heads % params.num_groups == 0, kOp, "num_groups must divide num_heads");
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    launch_state_size<typename decltype(tag)::Type>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace headway::cuda
