// First half of the decode step over slot windows: the convolution, the slots' logs, and what every input of a window
// weighs in each new token's output. One block a (row, 16 heads of a group) for B, C and the weights, more for the
// row's x. Every trip to memory is waited for, and blocks are many: what counts is how many a multiprocessor holds.
//
// In one launch no block writes what another reads: the rings' new entries are others than those read (params/mamba.h
// says how long the rings must be for that), and the convolution columns at the base are replaced only in a step that
// does not read them (core/state_base.h).
#include "cuda/common/chained.cuh"
#include "cuda/mamba_decode_conv.cuh"
#include "cuda/state_window.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "mamba_decode";
constexpr int kThreads = 128;
constexpr int kResidentBlocks = 8;  // a multiprocessor
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlockHeads = 16;

// kIsOne, here and below: rows have one token at most.
template <typename T, bool kIsOne>
__device__ __forceinline__ void convolve_x(const MambaDecodeParams& params, int row_idx, int piece) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t channel = static_cast<int64_t>(piece) * kWidth;
  const bool is_inside = channel < inner_channels(params);
  const Filter<T, kWidth> filter(params, is_inside ? channel : 0);
  const SlotRow row(params, row_idx);
  wait_for_previous_kernel();
  allow_next_kernel();
  if (!is_inside || row.is_padding() || row.num_tokens == 0) return;
  const PieceStep<T, kWidth> step{params, row, channel, true};
  const auto keep = [&](int i, const Piece<T, kWidth>& out) {
    out.store(log_column<T>(params, row.slot, (row.start + i) % params.log.num_entries, channel));
  };
  if constexpr (kIsOne) {
    keep(0, step.run_one(filter));
  } else {
    step.run(filter, keep);
  }
}

// What a block of 16 heads works on. Entries count from the first new token's canonical base.
template <typename T, int kN, bool kIsOne>
struct GroupMemory {
  static constexpr int kEntries = kIsOne ? kMaxWindow : kMaxEntries;
  static constexpr int kQuery = kIsOne ? 1 : kMaxQuery;
  alignas(16) T B[kEntries][kN];
  alignas(16) T C[kQuery][kN];
  float scores[kQuery][kMaxWindow];  // B_j . C_i, j from i's canonical base on
  float dt[kEntries][kBlockHeads];   // step sizes
  float A[kBlockHeads];
};

// Heads of a group and the entries they see.
struct HeadBlock {
  int group;
  int first_head;
  int num_heads;  // up to 16
  int first;      // entry 0's position
  int num_old;    // entries in the log
  int num_entries;
  int ring_begin;  // entry 0's place in the log
  bool is_kept;    // of a group's blocks the one that writes what they share

  __device__ __forceinline__ HeadBlock(const MambaDecodeParams& params, const SlotRow& row, int part,
                                       int blocks_a_group) {
    const int heads_a_group = params.num_heads / params.num_groups;
    group = part / blocks_a_group;
    const int begin = part % blocks_a_group * kBlockHeads;
    is_kept = begin == 0;
    first_head = group * heads_a_group + begin;
    num_heads = min(heads_a_group - begin, kBlockHeads);
    first = row.canonical(row.start);
    num_old = row.start - first;
    num_entries = num_old + row.num_tokens;
    ring_begin = first % params.log.num_entries;
  }

  __device__ __forceinline__ int ring_entry(const MambaDecodeParams& params, int entry) const {
    const int index = ring_begin + entry;
    return index < params.log.num_entries ? index : index - params.log.num_entries;
  }
};

// Threads from the first on convolve B and C; the others meanwhile fetch the log's B.
template <typename T, int kN, bool kIsOne>
__device__ __forceinline__ void stage_group(const MambaDecodeParams& params, const SlotRow& row, const HeadBlock& block,
                                            const Filter<T>& filter, int64_t channel,
                                            GroupMemory<T, kN, kIsOne>& memory) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kFetches = kN / kWidth;
  constexpr int kPieces = kN / kPieceWidth;
  constexpr int kFetchers = 2 * kPieces < kThreads ? kThreads - 2 * kPieces : kThreads;
  static_assert(2 * kPieces <= kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t group_channel = inner_channels(params) + static_cast<int64_t>(block.group) * kN;
  if (thread >= kThreads - kFetchers) {
#pragma unroll 4
    for (int index = thread - (kThreads - kFetchers); index < block.num_old * kFetches; index += kFetchers) {
      const int entry = index / kFetches;
      const int n = index % kFetches * kWidth;
      const int ring_entry = block.ring_entry(params, entry);
      const T* source = log_column<T>(params, row.slot, ring_entry, group_channel + n);
      *reinterpret_cast<Vector<T, kWidth>*>(&memory.B[entry][n]) = *reinterpret_cast<const Vector<T, kWidth>*>(source);
    }
  }
  if (thread >= 2 * kPieces) return;
  const bool is_b = thread < kPieces;
  const int n = thread % kPieces * kPieceWidth;
  const PieceStep<T> step{params, row, channel, block.is_kept};
  const auto keep = [&](int i, const Piece<T>& out) {
    out.store(is_b ? &memory.B[block.num_old + i][n] : &memory.C[i][n]);
    T* kept = static_cast<T*>(params.convolved) + (row.token + i) * conv_channels(params) + channel;
    if (is_b) kept = log_column<T>(params, row.slot, (row.start + i) % params.log.num_entries, channel);
    if (block.is_kept) out.store(kept);
  };
  if constexpr (kIsOne) {
    keep(0, step.run_one(filter));
  } else {
    step.run(filter, keep);
  }
}

// The raw step sizes of the block's entries and heads, a thread's at once: the log's, or this step's, which go to the
// log.
template <typename T, int kEntries>
struct RawSteps {
  static constexpr int kCount = kEntries * kBlockHeads / kThreads;
  T values[kCount];

  __device__ __forceinline__ RawSteps(const MambaDecodeParams& params, const SlotRow& row, const HeadBlock& block) {
    for_each(block, [&](int i, int entry, int head) {
      const int position = block.first + entry;
      T* kept = log_dt<T>(params, row.slot, block.ring_entry(params, entry), block.first_head + head);
      const T* brought = static_cast<const T*>(params.dt) + (row.token + position - row.start) * params.token_stride +
                         block.first_head + head;
      values[i] = position < row.start ? *kept : *brought;
      if (position >= row.start) *kept = values[i];
    });
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(const HeadBlock& block, Visit&& visit) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x);
      const int head = index % kBlockHeads;
      if (index / kBlockHeads < block.num_entries && head < block.num_heads) visit(i, index / kBlockHeads, head);
    }
  }
};

template <typename T, int kN, bool kIsOne>
__device__ __forceinline__ void score_entries(const SlotRow& row, const HeadBlock& block,
                                              GroupMemory<T, kN, kIsOne>& memory) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll(kIsOne ? 4 : 2)
  for (int pair = warp; pair < row.num_tokens * kMaxWindow; pair += kWarps) {
    const int i = pair / kMaxWindow;
    const int entry = row.canonical(row.start + i) - block.first + pair % kMaxWindow;
    if (entry > block.num_old + i) continue;
    const float score = warp_dot<kN>(memory.B[entry], memory.C[i]);
    if (lane == 0) memory.scores[i][pair % kMaxWindow] = score;
  }
}

// Half a warp a (token, head).
template <typename T, int kN, bool kIsOne>
__device__ __forceinline__ void weigh_inputs(const MambaDecodeParams& params, const SlotRow& row,
                                             const HeadBlock& block, const GroupMemory<T, kN, kIsOne>& memory) {
  const int half = static_cast<int>(threadIdx.x) / kMaxWindow;
  const int lane = static_cast<int>(threadIdx.x) % kMaxWindow;
#pragma unroll 1
  for (int index = half; index < row.num_tokens * kBlockHeads; index += kThreads / kMaxWindow) {
    const int i = index / kBlockHeads;
    const int head = index % kBlockHeads;
    const int begin = row.canonical(row.start + i) - block.first;
    const int count = block.num_old + i + 1 - begin;
    const Stretch stretch(lane < count ? memory.dt[begin + lane][head] : 0.0f, count, memory.A[head]);
    if (head >= block.num_heads) continue;  // whole half-warps; the other half's shuffles are over
    const int64_t row_of_table = static_cast<int64_t>(row.token + i) * params.num_heads + block.first_head + head;
    store_weights(stretch, count, memory.scores[i][lane], params.D[block.first_head + head],
                  params.table + row_of_table * kTableWidth);
  }
}

template <typename T, int kN, bool kIsOne>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    decode_inputs_kernel(MambaDecodeParams params, int blocks_a_group, int x_blocks) {
  __shared__ GroupMemory<T, kN, kIsOne> memory;
  constexpr int kPieces = kN / kPieceWidth;
  const int thread = static_cast<int>(threadIdx.x);
  const int head_blocks = params.num_groups * blocks_a_group;
  const int all_head_blocks = params.rows.num_rows * head_blocks;  // first: theirs is the longest chain
  const int block_idx = static_cast<int>(blockIdx.x);
  if (block_idx >= all_head_blocks) {
    const int index = block_idx - all_head_blocks;
    convolve_x<T, kIsOne>(params, index / x_blocks, index % x_blocks * kThreads + thread);
    return;
  }
  const int row_idx = block_idx / head_blocks;
  const int part = block_idx % head_blocks;
  const int group = part / blocks_a_group;
  const int64_t states = thread < kPieces ? group : params.num_groups + group;
  const int64_t channel =
      inner_channels(params) + (thread < 2 * kPieces ? states : 0) * kN + thread % kPieces * kPieceWidth;
  const Filter<T> filter(params, channel);
  const SlotRow row(params, row_idx);
  wait_for_previous_kernel();
  allow_next_kernel();
  if (row.is_padding() || row.num_tokens == 0) return;
  const HeadBlock heads(params, row, part, blocks_a_group);
  const RawSteps<T, GroupMemory<T, kN, kIsOne>::kEntries> steps(params, row, heads);
  stage_group(params, row, heads, filter, channel, memory);
  steps.for_each(heads, [&](int i, int entry, int head) {
    memory.dt[entry][head] = step_size(params, steps.values[i], params.dt_bias[heads.first_head + head]);
  });
  if (thread < heads.num_heads) memory.A[thread] = params.A[heads.first_head + thread];
  __syncthreads();
  score_entries(row, heads, memory);
  __syncthreads();
  weigh_inputs(params, row, heads, memory);
}

template <typename T, int kN>
void launch(const MambaDecodeParams& params, cudaStream_t stream) {
  const int64_t d_inner = static_cast<int64_t>(params.num_heads) * params.head_dim;
  const int64_t block_channels = kThreads * kVectorWidth<T>;
  const int blocks_a_group = (params.num_heads / params.num_groups + kBlockHeads - 1) / kBlockHeads;
  const int x_blocks = static_cast<int>((d_inner + block_channels - 1) / block_channels);
  const int64_t num_blocks =
      static_cast<int64_t>(params.rows.num_rows) * (params.num_groups * blocks_a_group + x_blocks);
  require(num_blocks <= INT32_MAX, kOp, "num_rows is too large for one launch");
  const auto kernel =
      params.max_query_len == 1 ? decode_inputs_kernel<T, kN, true> : decode_inputs_kernel<T, kN, false>;
  launch_chained(kOp, kernel, dim3(static_cast<unsigned>(num_blocks)), kThreads, stream, params, blocks_a_group,
                 x_blocks);
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
