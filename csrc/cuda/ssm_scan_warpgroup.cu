// ssm_scan for prompts on sm_90a: ssm_warpgroup.cuh's blocks over rows and tiles of channels, the last few tokens of a
// row token by token (ssm_recurrence.cuh), and the launch. Heads of at least 64 channels in multiples of 16.
//
// What is bit-equal: as in ssm_scan_chunked.cu. The chunk grid lies on absolute positions, the tiles of a group
// are always the same.
#include "cuda/common/device.h"
#include "cuda/common/sm90a_code.h"
#include "cuda/common/vector.cuh"
#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_scan.h"
#include "cuda/ssm_warpgroup.cuh"
#include "cuda/ssm_warpgroup_copies.cuh"
#include "cuda/ssm_warpgroup_scores.cuh"
#include "cuda/ssm_warpgroup_tile.cuh"

namespace headway::cuda {
namespace {

using namespace warpgroup;

constexpr char kOp[] = "ssm_scan";

// Blocks of a row, and what to do with rows that have no chunks.
struct Plan {
  int row_blocks;
  int group_blocks;   // of a row, for one group of heads
  bool is_all_rows;   // every row has items here, chunks or not; else chunked rows alone, found by rank
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kN, bool kStraddles>
__device__ __forceinline__ void scan_chunks(const Work& work, int row, const chunk::RowTokens& tokens,
                                            Shared<kN>& shared, unsigned& turn) {
  const SsmScanParams& params = work.params;
  const int role = static_cast<int>(threadIdx.x) / kGroupThreads;
  if (role == 1) {
    ScoreGroup<kN> group(work, shared);
    if (turn == 0) group.clear_weights();
    group.run(tokens, turn);
  } else if (role > 1) {
    CopyGroup<kN>(work, shared).run(tokens, turn);
  } else {
    TileGroup<kN, kStraddles> group(work, shared);
    const float* source = static_cast<float*>(params.state) + params.read_slots[row] * params.state_stride;
    group.load_state(tokens.start > 0 ? source : nullptr);
    group.run(tokens, chunk::SnapshotCursor(params, row), turn);
    group.store_state(static_cast<float*>(params.state) + params.write_slots[row] * params.state_stride);
  }
}

// What scan_chunks left of the row: for the heads of the block, their channels in it.
template <int kN>
__device__ __forceinline__ void scan_rest_of_heads(const Work& work, int row, void* shared) {
  const int head_dim = work.params.head_dim;
  const int end = work.first_channel + kTileChannels;
  const int first_head = work.first_head();
  for (int channel = work.first_channel; channel < end;) {
    const int head_end = min(end, (channel / head_dim + 1) * head_dim);
    const int head = first_head + work.local_head(channel);
    chunk::scan_rest<kN>(work.params, row, head, channel % head_dim, head_end - channel, shared);
    __syncthreads();
    channel = head_end;
  }
}

#endif

template <int kN, bool kStraddles>
__global__ void __launch_bounds__(kThreads, 1) warpgroup_scan_kernel(SsmScanParams params, Plan plan, int num_items) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kN>*>(shared_bytes);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();

  // Item -> (row, group of heads, tile of the group), in strides. Neighbours share B and C in the cache.
  unsigned turn = 0;
  for (int item = static_cast<int>(blockIdx.x); item < num_items; item += static_cast<int>(gridDim.x)) {
    const int rank = item / plan.row_blocks;
    const int row = plan.is_all_rows ? rank : chunk::find_chunked_row(params.rows, rank);
    if (row < 0) return;
    const int group = item % plan.row_blocks / plan.group_blocks;
    const Work work{params, group, item % plan.group_blocks * kTileChannels};
    const chunk::RowTokens tokens(params.rows, row);
    if (tokens.num_tokens > 0) scan_chunks<kN, kStraddles>(work, row, tokens, shared, turn);
    __syncthreads();  // the row's state is in its slot, and the stages are free
    scan_rest_of_heads<kN>(work, row, &shared);
  }
#endif
}

// Launch ------------------------------------------------------------------------------------------------------------

template <int kN, bool kStraddles>
void launch(const SsmScanParams& params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(Shared<kN>);
  static_assert(sizeof(ScanTile<kN>) <= sizeof(Shared<kN>::stages), "the recurrence works where stages lie");
  const int64_t max_query_len = params.max_query_len > 0 ? params.max_query_len : params.num_tokens;
  Plan plan{};
  plan.group_blocks = params.num_heads / params.num_groups * params.head_dim / kTileChannels;
  plan.row_blocks = plan.group_blocks * params.num_groups;
  plan.is_all_rows = params.rows.num_rows * max_query_len <= params.num_tokens;  // all of one length
  const int64_t num_rows = plan.is_all_rows ? params.rows.num_rows : max_chunked_rows(params);
  const int64_t num_items = num_rows * plan.row_blocks;
  require(num_items <= INT32_MAX / 2, kOp, "num_rows * num_heads is too large for one launch");
  // Among many decode rows the bound is far too high: blocks that find no row cost more than blocks that take several.
  const bool is_mostly_decode = params.num_tokens < 32 * static_cast<int64_t>(params.rows.num_rows);
  const int64_t resident = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  const int64_t num_blocks = is_mostly_decode && num_items > resident ? resident : num_items;
  const auto kernel = warpgroup_scan_kernel<kN, kStraddles>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), kOp);
  if (num_blocks > 0) {
    kernel<<<static_cast<unsigned>(num_blocks), kThreads, kSharedBytes, stream>>>(params, plan,
                                                                                  static_cast<int>(num_items));
    check_launch(kOp);
  }
  if (!plan.is_all_rows) launch_short_rows_scan(params, stream);
}

template <int kN>
void launch_state_size(const SsmScanParams& params, cudaStream_t stream) {
  if (params.head_dim % kTileChannels != 0) return launch<kN, true>(params, stream);
  launch<kN, false>(params, stream);
}

}  // namespace

bool can_scan_warpgroups(const SsmScanParams& params) {
  const int64_t group_channels = static_cast<int64_t>(params.num_heads / params.num_groups) * params.head_dim;
  const bool has_shape = (params.state_size == 64 || params.state_size == 128) && params.head_dim >= kTileChannels &&
                         params.head_dim % kBlock == 0 && group_channels % kTileChannels == 0;
  return has_shape && can_scan_chunks(params) && runs_sm90a_code(kOp);
}

void launch_warpgroup_scan(const SsmScanParams& params, cudaStream_t stream) {
  if (params.state_size == 64) return launch_state_size<64>(params, stream);
  launch_state_size<128>(params, stream);
}

}  // namespace headway::cuda
