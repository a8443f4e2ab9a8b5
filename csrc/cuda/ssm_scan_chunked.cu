// ssm_scan for prompts: rows in chunks on the tensor cores (ssm_chunk.cuh), their last few tokens and all short rows
// token by token (ssm_recurrence.cuh), in one launch.
//
// What is bit-equal: the chunk grid lies on absolute positions, so a row gives the same bits whatever its batch mates,
// whatever slice width the launch chose, and however it was cut at multiples of kChunkTokens, if it began at one.
// Outputs before a cut are bit-equal wherever the cut lies; a cut inside a chunk changes what follows by rounding,
// since the state is then read between two points of the grid.
#include "cuda/common/device.h"
#include "cuda/common/mma.cuh"
#include "cuda/ops.h"
#include "cuda/ssm_chunk.cuh"
#include "cuda/ssm_chunk_channels.cuh"
#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_chunk_scores.cuh"
#include "cuda/ssm_recurrence.cuh"
#include "cuda/ssm_scan.h"

namespace headway::cuda {
namespace {

using namespace chunk;

constexpr char kOp[] = "ssm_scan";

// The two roles of a row's chunks meet twice a chunk: when its data is there and the last one's has been read, and when
// its weights are there. The next chunk's copies run meanwhile.
template <int kN, int kSlice, typename State>
__device__ __forceinline__ void run_channel_warp(ChannelWarp<kN, kSlice, State>& warp, const RowTokens& tokens,
                                                 SnapshotCursor snapshots) {
  Chunk chunk = tokens.chunk_at(0);
  int done = 0;
  for (int stage = 0; chunk.count > 0; stage ^= 1) {
    wait_copies<0>();
    __syncthreads();
    done += chunk.count;
    const Chunk next = tokens.chunk_at(done);
    if (next.count > 0) warp.copy_chunk(stage ^ 1, next);
    warp.read_state(stage);
    warp.advance_state(stage);
    __syncthreads();
    warp.add_tokens(stage);
    warp.store_outputs(stage, chunk);
    warp.round_state(tokens.start + done);
    if (State* slot = snapshots.take<State>(tokens.start + done); slot != nullptr) warp.store_state(slot);
    chunk = next;
  }
}

template <int kN, int kSlice>
__device__ __forceinline__ void run_score_warp(const ScoreWarp<kN, kSlice>& warp, const RowTokens& tokens) {
  const bool is_clock = warp.block == 0;  // the warp with the fewest scores makes the decays
  Chunk chunk = tokens.chunk_at(0);
  int done = 0;
  for (int stage = 0; chunk.count > 0; stage ^= 1) {
    wait_copies<0>();
    __syncthreads();
    done += chunk.count;
    const Chunk next = tokens.chunk_at(done);
    HeadClock::RawPair next_dt = {};
    if (next.count > 0) {
      if (is_clock) next_dt = warp.clock.load_dt(next);
      warp.copy_chunk(stage ^ 1, next);
    }
    warp.store_weights(stage);
    if (is_clock && next.count > 0) warp.clock.store_decays(warp.shared.decays[stage ^ 1], next_dt, next);
    __syncthreads();
    chunk = next;
  }
}

template <int kN, int kSlice, typename State>
__device__ __forceinline__ void scan_row(const Work& work, int row, Shared<kN, kSlice>& shared) {
  const SsmScanParams& params = work.params;
  const RowTokens tokens(params.rows, row);
  const Chunk first = tokens.chunk_at(0);
  const int warp_idx = static_cast<int>(threadIdx.x) / kWarpSize;
  if (warp_idx >= kChannelWarps<kSlice>) {
    const ScoreWarp<kN, kSlice> warp(work, shared, warp_idx - kChannelWarps<kSlice>);
    warp.copy_chunk(0, first);
    if (warp.block == 0) warp.clock.store_decays(shared.decays[0], warp.clock.load_dt(first), first);
    run_score_warp(warp, tokens);
  } else {
    ChannelWarp<kN, kSlice, State> warp(work, shared, warp_idx);
    warp.copy_chunk(0, first);
    State* slots = static_cast<State*>(params.state);
    const bool has_state = tokens.start > 0;
    warp.load_state(has_state ? slots + params.read_slots[row] * params.state_stride : nullptr);
    run_channel_warp(warp, tokens, SnapshotCursor(params, row));
    warp.store_state(slots + params.write_slots[row] * params.state_stride);
  }
}

template <int kN, int kSlice, int kResident, typename State>
__global__ void __launch_bounds__(kThreads<kSlice>, kResident)
    chunked_scan_kernel(SsmScanParams params, int slices, int num_chunk_blocks) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kN, kSlice>*>(shared_bytes);
  const int heads_per_group = params.num_heads / params.num_groups;

  // Block -> (row that has chunks, head, slice), in strides. Neighbours share B and C in the cache.
  const int block = static_cast<int>(blockIdx.x);
  for (int item = block; block < num_chunk_blocks; item += num_chunk_blocks) {
    const int row = find_chunked_row(params.rows, item / slices / params.num_heads);
    if (row < 0) return;
    const int head = item / slices % params.num_heads;
    const int first_channel = item % slices * kSlice;
    const int num_channels = min(kSlice, params.head_dim - first_channel);
    scan_row<kN, kSlice, State>(Work{params, head, head / heads_per_group, first_channel, num_channels}, row, shared);
    __syncthreads();  // the row's state is in its slot, and shared memory is free
    scan_rest<kN, State>(params, row, head, first_channel, num_channels, &shared);
    __syncthreads();
  }

  // Block -> (row, head) for the rows without chunks.
  const int item = block - num_chunk_blocks;
  const int row = item / params.num_heads;
  if (RowTokens(params.rows, row).num_tokens > 0) return;
  scan_rest<kN, State>(params, row, item % params.num_heads, 0, params.head_dim, &shared);
}

// Launch ------------------------------------------------------------------------------------------------------------

template <int kN, int kSlice, int kResident, typename State>
void launch(const SsmScanParams& params, int num_processors, cudaStream_t stream) {
  static_assert(kSlice % kBlock == 0);
  const int slices = (params.head_dim + kSlice - 1) / kSlice;
  const int64_t num_items = max_chunked_rows(params) * params.num_heads * slices;
  // Among many decode rows the bound is far too high: blocks that find no row cost more than blocks that take several.
  const bool is_mostly_decode = params.num_tokens < 32 * static_cast<int64_t>(params.rows.num_rows);
  const int64_t resident = 2 * static_cast<int64_t>(num_processors);
  const int64_t num_chunk_blocks = is_mostly_decode && num_items > resident ? resident : num_items;
  const int64_t num_blocks = num_chunk_blocks + static_cast<int64_t>(params.rows.num_rows) * params.num_heads;
  require(num_blocks <= INT32_MAX / 2, kOp, "num_rows * num_heads is too large for one launch");
  constexpr int kSharedBytes = sizeof(Shared<kN, kSlice>);
  const auto kernel = chunked_scan_kernel<kN, kSlice, kResident, State>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), kOp);
  static_assert(sizeof(ScanTile<kN>) <= kSharedBytes, "the recurrence works in the same shared memory");
  kernel<<<static_cast<unsigned>(num_blocks), kThreads<kSlice>, kSharedBytes, stream>>>(
      params, slices, static_cast<int>(num_chunk_blocks));
  check_launch(kOp);
}

// A slice width, the blocks that share a multiprocessor, and what a wave of them costs, in percent of slices of 64
// alone on theirs: measured on an H200 at N = 128.
struct Variant {
  int slice;
  int num_resident;
  int wave_cost;
};
constexpr Variant kVariants[] = {{64, 2, 195}, {64, 1, 100}, {32, 1, 88}, {80, 1, 125}};

Variant cheapest_variant(const SsmScanParams& params, int num_processors) {
  Variant best = kVariants[0];
  int64_t best_cost = INT64_MAX;
  for (const Variant& variant : kVariants) {
    const int64_t slices = (params.head_dim + variant.slice - 1) / variant.slice;
    const int64_t num_blocks = max_chunked_rows(params) * params.num_heads * slices;
    const int64_t wave = static_cast<int64_t>(num_processors) * variant.num_resident;
    const int64_t cost = (num_blocks + wave - 1) / wave * variant.wave_cost;
    if (cost < best_cost) {
      best = variant;
      best_cost = cost;
    }
  }
  return best;
}

template <int kN, typename State>
void launch_cheapest(const SsmScanParams& params, int num_processors, cudaStream_t stream) {
  const Variant variant = cheapest_variant(params, num_processors);
  if (variant.slice == 80) return launch<kN, 80, 1, State>(params, num_processors, stream);
  if (variant.slice == 32) return launch<kN, 32, 1, State>(params, num_processors, stream);
  if (variant.num_resident == 1) return launch<kN, 64, 1, State>(params, num_processors, stream);
  launch<kN, 64, 2, State>(params, num_processors, stream);
}

}  // namespace

bool can_scan_chunks(const SsmScanParams& params) {
  const bool is_aligned = is_vectorisable<Bf16>(params.x, params.x_stride, params.head_dim) &&
                          is_vectorisable<Bf16>(params.B, params.b_stride, params.state_size) &&
                          is_vectorisable<Bf16>(params.C, params.c_stride, params.state_size) &&
                          is_vectorisable<Bf16>(params.out, params.head_dim, params.head_dim) &&
                          is_vectorisable<float>(params.state, params.state_stride, params.state_size);
  const int n = params.state_size;
  const size_t shared_bytes = n == 256 ? sizeof(Shared<256, 32>) : sizeof(Shared<128, 80>);
  return params.dtype == DType::kBFloat16 && is_aligned && (n == 64 || n == 128 || n == 256) &&
         static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kOp)) >= shared_bytes;
}

void launch_chunked_scan(const SsmScanParams& params, cudaStream_t stream) {
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  dispatch_state(params.state_dtype, kOp, [&](auto tag) {
    using State = typename decltype(tag)::Type;
    if (params.state_size == 256) return launch<256, 32, 1, State>(params, processors, stream);
    if (params.state_size == 64) return launch_cheapest<64, State>(params, processors, stream);
    launch_cheapest<128, State>(params, processors, stream);
  });
}

}  // namespace headway::cuda
