// First half of the decode step over slot windows: the convolution, the slots' logs, and what every input of a window
// weighs in each new token's output. One block a (row, group) for B, C and the weights, more for the row's x.
//
// In one launch no block writes what another reads: the rings' new entries are others than those read (params/mamba.h
// says how long the rings must be for that), and the convolution columns at the base are replaced only in a step that
// does not read them (core/state_base.h).
#include "cuda/common/chained.cuh"
#include "cuda/common/math.cuh"
#include "cuda/state_window.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "mamba_decode";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTaps = 4;  // of every published Mamba-2
constexpr int kMaxEntries = kMaxWindow + kMaxQuery;  // from the first new token's canonical base on

template <typename T>
using Piece = Vector<T, kVectorWidth<T>>;

template <typename T>
__device__ __forceinline__ Piece<T> load_piece(const T* source) {
  return *reinterpret_cast<const Piece<T>*>(source);
}
template <typename T>
__device__ __forceinline__ void store_piece(T* target, const Piece<T>& piece) {
  *reinterpret_cast<Piece<T>*>(target) = piece;
}
template <typename T>
__device__ __forceinline__ void widen_piece(const Piece<T>& piece, float* out) {
#pragma unroll
  for (int i = 0; i < kVectorWidth<T>; i += 4) {
    Vector<float, 4> four;
#pragma unroll
    for (int j = 0; j < 4; ++j) four.values[j] = to_float(piece.values[i + j]);
    *reinterpret_cast<Vector<float, 4>*>(out + i) = four;
  }
}

// silu(bias + weight . window), rounded to T as the convolution's output is. Never written by a step.
template <typename T>
struct Filter {
  Piece<T> weights[kTaps];
  Piece<T> bias;

  __device__ __forceinline__ Filter(const MambaDecodeParams& params, int64_t channel) {
    const T* source = static_cast<const T*>(params.conv_weight) + channel;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) weights[tap] = load_piece(source + tap * conv_channels(params));
    bias = {};
    if (params.conv_bias != nullptr) bias = load_piece(static_cast<const T*>(params.conv_bias) + channel);
  }

  __device__ __forceinline__ Piece<T> apply(const Piece<T> (&window)[kTaps]) const {
    Piece<T> out;
#pragma unroll
    for (int i = 0; i < kVectorWidth<T>; ++i) {
      float sum = to_float(bias.values[i]);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        sum = fmaf(to_float(weights[tap].values[i]), to_float(window[tap].values[i]), sum);
      }
      out.values[i] = from_float<T>(sizeof(T) == 4 ? silu(sum) : fast_silu(sum));
    }
    return out;
  }
};

// One piece of channels of conv_dim: convolves the row's new tokens and keeps their raw columns.
template <typename T>
struct PieceStep {
  const MambaDecodeParams& params;
  const SlotRow& row;
  int64_t channel;

  __device__ __forceinline__ T* raw_column(int position) const {
    return static_cast<T*>(params.log.raw) + row.slot * params.log.raw_stride +
           position % params.log.num_raw * conv_channels(params) + channel;
  }
  __device__ __forceinline__ T* base_column(int tap) const {
    return static_cast<T*>(params.conv_state) + row.slot * params.conv_state_stride + tap * conv_channels(params) +
           channel;
  }
  __device__ __forceinline__ const T* new_column(int i) const {
    return static_cast<const T*>(params.columns) + (row.token + i) * params.token_stride + channel;
  }

  // emit(i, piece) gets each new token's output.
  template <typename Emit>
  __device__ __forceinline__ void run(const Filter<T>& filter, Emit&& emit) const {
    Piece<T> window[kTaps];
    load_past(window);
    window[kTaps - 1] = load_piece(new_column(0));
    keep_past(window);
    for (int i = 0; i < row.num_tokens; ++i) {
      if (i > 0) window[kTaps - 1] = load_piece(new_column(i));
      emit(i, filter.apply(window));
      store_piece(raw_column(row.start + i), window[kTaps - 1]);
#pragma unroll
      for (int tap = 0; tap + 1 < kTaps; ++tap) window[tap] = window[tap + 1];
    }
    if (row.next_base > row.base) move_base();
  }

  __device__ __forceinline__ void load_past(Piece<T> (&window)[kTaps]) const {
#pragma unroll
    for (int tap = 0; tap + 1 < kTaps; ++tap) {
      const int position = row.start - (kTaps - 1) + tap;
      window[tap] = {};
      if (position >= 0) window[tap] = load_piece(row.start == row.base ? base_column(tap) : raw_column(position));
    }
  }

  // The first step after a prompt: later ones find their columns in the ring.
  __device__ __forceinline__ void keep_past(const Piece<T> (&window)[kTaps]) const {
    if (row.start != row.base) return;
#pragma unroll
    for (int tap = 0; tap + 1 < kTaps; ++tap) {
      const int position = row.start - (kTaps - 1) + tap;
      if (position >= 0) store_piece(raw_column(position), window[tap]);
    }
  }

  __device__ __forceinline__ void move_base() const {
#pragma unroll
    for (int tap = 0; tap + 1 < kTaps; ++tap) {
      const int position = row.next_base - (kTaps - 1) + tap;
      const bool is_new = position >= row.start;
      store_piece(base_column(tap), load_piece(is_new ? new_column(position - row.start) : raw_column(position)));
    }
  }
};

template <typename T>
__device__ __forceinline__ void convolve_x(const MambaDecodeParams& params, int row_idx, int piece) {
  const int64_t channel = static_cast<int64_t>(piece) * kVectorWidth<T>;
  const bool is_inside = channel < inner_channels(params);
  const Filter<T> filter(params, is_inside ? channel : 0);
  wait_for_previous_kernel();
  allow_next_kernel();
  const SlotRow row(params, row_idx);
  if (!is_inside || row.is_padding()) return;
  PieceStep<T>{params, row, channel}.run(filter, [&](int i, const Piece<T>& out) {
    store_piece(log_column<T>(params, row.slot, (row.start + i) % params.log.num_entries, channel), out);
  });
}

// Entries count from the first new token's canonical base.
template <int kN>
struct GroupMemory {
  alignas(16) float B[kMaxEntries][kN];
  alignas(16) float C[kMaxQuery][kN];
  float scores[kMaxQuery][kMaxWindow];  // B_j . C_i, j from i's canonical base on
};

// Threads from the first on convolve B and C; the others meanwhile fetch the log's B.
template <typename T, int kN>
__device__ __forceinline__ void stage_group(const MambaDecodeParams& params, const SlotRow& row, int group, int first,
                                            const Filter<T>& filter, int64_t channel, GroupMemory<kN>& memory) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kPieces = kN / kWidth;
  static_assert(2 * kPieces <= kThreads / 2);
  const int thread = static_cast<int>(threadIdx.x);
  const int num_old = row.start - first;
  if (thread < 2 * kPieces) {
    const bool is_b = thread < kPieces;
    const int n = thread % kPieces * kWidth;
    PieceStep<T>{params, row, channel}.run(filter, [&](int i, const Piece<T>& out) {
      widen_piece(out, is_b ? &memory.B[num_old + i][n] : &memory.C[i][n]);
      T* kept = static_cast<T*>(params.convolved) + (row.token + i) * conv_channels(params) + channel;
      if (is_b) kept = log_column<T>(params, row.slot, (row.start + i) % params.log.num_entries, channel);
      store_piece(kept, out);
    });
    return;
  }
  const int64_t group_channel = inner_channels(params) + static_cast<int64_t>(group) * kN;
#pragma unroll 4
  for (int index = thread - 2 * kPieces; index < num_old * kPieces; index += kThreads - 2 * kPieces) {
    const int entry = index / kPieces;
    const int n = index % kPieces * kWidth;
    const int ring_entry = (first + entry) % params.log.num_entries;
    widen_piece(load_piece(log_column<T>(params, row.slot, ring_entry, group_channel + n)), &memory.B[entry][n]);
  }
}

template <int kN>
__device__ __forceinline__ void score_entries(const SlotRow& row, int first, GroupMemory<kN>& memory) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll 2
  for (int pair = warp; pair < row.num_tokens * kMaxWindow; pair += kWarps) {
    const int i = pair / kMaxWindow;
    const int entry = row.canonical(row.start + i) - first + pair % kMaxWindow;
    if (entry > row.start - first + i) continue;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kN; n += kWarpSize) sum = fmaf(memory.B[entry][n + lane], memory.C[i][n + lane], sum);
    sum = warp_sum(sum);
    if (lane == 0) memory.scores[i][pair % kMaxWindow] = sum;
  }
}

// Raw step size of a position: the log's, or this step's, which goes to the log.
template <typename T>
__device__ __forceinline__ T fetch_dt(const MambaDecodeParams& params, const SlotRow& row, int position, int head) {
  T* kept = log_dt<T>(params, row.slot, position % params.log.num_entries, head);
  if (position < row.start) return *kept;
  const T raw = static_cast<const T*>(params.dt)[(row.token + position - row.start) * params.token_stride + head];
  *kept = raw;
  return raw;
}

// A warp a (token, head) of the group.
template <typename T, int kN>
__device__ __forceinline__ void weigh_inputs(const MambaDecodeParams& params, const SlotRow& row, int group,
                                             const GroupMemory<kN>& memory) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int heads_a_group = params.num_heads / params.num_groups;
#pragma unroll 2
  for (int index = warp; index < row.num_tokens * heads_a_group; index += kWarps) {
    const int i = index / heads_a_group;
    const int head = group * heads_a_group + index - i * heads_a_group;
    const int first = row.canonical(row.start + i);
    const int count = row.start + i + 1 - first;
    const float dt = lane < count ? step_size(params, fetch_dt<T>(params, row, first + lane, head), head) : 0.0f;
    const Stretch stretch(dt, count, params.A[head]);
    float* table = params.table + (static_cast<int64_t>(row.token + i) * params.num_heads + head) * kTableWidth;
    if (lane < kMaxWindow) table[1 + lane] = lane < count ? stretch.weight() * memory.scores[i][lane] : 0.0f;
    if (lane == 0) table[0] = expf(stretch.total);
  }
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads) decode_inputs_kernel(MambaDecodeParams params, int blocks_a_row) {
  __shared__ GroupMemory<kN> memory;
  constexpr int kPieces = kN / kVectorWidth<T>;
  const int row_idx = static_cast<int>(blockIdx.x) / blocks_a_row;
  const int part = static_cast<int>(blockIdx.x) % blocks_a_row;
  const int thread = static_cast<int>(threadIdx.x);
  if (part >= params.num_groups) {
    convolve_x<T>(params, row_idx, (part - params.num_groups) * kThreads + thread);
    return;
  }
  const int64_t block = thread < kPieces ? part : params.num_groups + part;
  const int64_t channel =
      inner_channels(params) + (thread < 2 * kPieces ? block : 0) * kN + thread % kPieces * kVectorWidth<T>;
  const Filter<T> filter(params, channel);
  wait_for_previous_kernel();
  allow_next_kernel();
  const SlotRow row(params, row_idx);
  if (row.is_padding()) return;
  const int first = row.canonical(row.start);
  stage_group<T, kN>(params, row, part, first, filter, channel, memory);
  __syncthreads();
  score_entries<kN>(row, first, memory);
  __syncthreads();
  weigh_inputs<T, kN>(params, row, part, memory);
}

template <typename T, int kN>
void launch(const MambaDecodeParams& params, cudaStream_t stream) {
  const int64_t d_inner = static_cast<int64_t>(params.num_heads) * params.head_dim;
  const int64_t block_channels = kThreads * kVectorWidth<T>;
  const int blocks_a_row = params.num_groups + static_cast<int>((d_inner + block_channels - 1) / block_channels);
  const int64_t num_blocks = static_cast<int64_t>(params.rows.num_rows) * blocks_a_row;
  require(num_blocks <= INT32_MAX, kOp, "num_rows is too large for one launch");
  launch_chained(kOp, decode_inputs_kernel<T, kN>, dim3(static_cast<unsigned>(num_blocks)), kThreads, stream, params,
                 blocks_a_row);
}

}  // namespace

void launch_decode_inputs(const MambaDecodeParams& params, cudaStream_t stream) {
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (params.state_size == 64) return launch<T, 64>(params, stream);
    if (params.state_size == 128) return launch<T, 128>(params, stream);
    if (params.state_size == 256) return launch<T, 256>(params, stream);
    require(false, kOp, "state_size is " + std::to_string(params.state_size) + "; expected 64, 128 or 256");
  });
}

}  // namespace headway::cuda
