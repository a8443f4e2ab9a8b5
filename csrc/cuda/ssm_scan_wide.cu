// ssm_scan for prompts on sm_90a: ssm_wide.cuh's blocks over the items of ssm_scan_plan.cuh, the last few tokens of a
// row token by token (ssm_recurrence.cuh), and the launch. Tiles of 80 channels for heads of these; of 64 where blocks
// outnumber tiles by so much that they share a row's chunks.
//
// What is bit-equal: as in ssm_scan_chunked.cu. Tiles of 64 have the bits of ssm_scan_warpgroup.cu, which takes all
// other rows: every sum adds the same products of the same bf16 operands in the same order, transposed. That the
// hardware rounds both alike is written nowhere; test_scan_chunks.py holds it to that.
#include "cuda/common/device.h"
#include "cuda/common/sm90a_code.h"
#include "cuda/common/vector.cuh"
#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_scan.h"
#include "cuda/ssm_scan_plan.cuh"
#include "cuda/ssm_wide.cuh"
#include "cuda/ssm_wide_copies.cuh"
#include "cuda/ssm_wide_outputs.cuh"
#include "cuda/ssm_wide_states.cuh"

namespace headway::cuda {
namespace {

using namespace wide;
using chunk::ScanItem;
using chunk::ScanPlan;

constexpr char kOp[] = "ssm_scan";
constexpr int kWholeChannels = 80;
constexpr int kSharedChannels = 64;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kN, int kP>
__device__ __forceinline__ void scan_chunks(const Work& work, const ScanPlan& plan, Shared<kN, kP>& shared,
                                            Place place) {
  const SsmScanParams& params = work.params;
  const ScanItem& item = work.item;
  const int role = static_cast<int>(threadIdx.x) / kGroupThreads;
  float* slots = static_cast<float*>(params.state);
  const float* source = item.tokens.start > 0 ? slots + params.read_slots[item.row] * params.state_stride : nullptr;
  if (role == 1) {
    StateGroup<kN, kP> group(work, shared);
    group.load(source);
    chunk::arrive_segment(plan);
    group.run(chunk::SnapshotCursor(params, item.row), place);
    chunk::wait_segments(plan);
    if (item.is_last) group.store(slots + params.write_slots[item.row] * params.state_stride);
  } else {
    chunk::arrive_segment(plan);
    if (role == 0) {
      CopyGroup<kN, kP> group(work, shared);
      group.prefetch_state(source);
      group.run(place);
    } else {
      OutputGroup<kN, kP>(work, shared).run(place);
    }
    chunk::wait_segments(plan);
  }
}

#endif

template <int kN, int kP>
__global__ void __launch_bounds__(kThreads, 1)
    wide_scan_kernel(const __grid_constant__ SsmScanParams params, const __grid_constant__ Maps maps,
                     const __grid_constant__ ScanPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kN, kP>*>(shared_bytes);
  begin_chained_kernel([&] {
    chunk::prefetch_maps(maps);
    shared.init_barriers();
  });
  Place start;
  const int head_tiles = params.head_dim / kP;
  chunk::for_each_item(params.rows, plan, [&](const ScanItem& item) {
    const int head = item.index / head_tiles;
    const int channel = item.index % head_tiles * kP;
    if (item.has_chunks()) {
      scan_chunks<kN, kP>(Work{params, maps, item, head, head * params.head_dim + channel}, plan, shared, start);
    }
    start.turn += item.end;
    start.output += item.end - item.first_output;
    if (!item.has_rest()) return;  // the next item begins while this one ends
    __syncthreads();  // the row's state is in its slot, and the stages are free
    if (item.is_last) chunk::scan_rest<kN>(params, item.row, head, channel, kP, &shared);
    __syncthreads();
  });
#endif
}

// Launch ------------------------------------------------------------------------------------------------------------

ScanPlan plan_tiles(const SsmScanParams& params, int tile_channels) {
  const int row_items = params.num_heads * params.head_dim / tile_channels;
  return chunk::plan_scan(params, row_items, device_attribute(cudaDevAttrMultiProcessorCount, kOp), kOp);
}

template <int kN, int kP>
void launch(const SsmScanParams& params, cudaStream_t stream) {
  using Memory = Shared<kN, kP>;
  static_assert(sizeof(ScanTile<kN>) <= sizeof(Memory::stages), "the recurrence works where stages lie");
  chunk::launch_plan(wide_scan_kernel<kN, kP>, plan_tiles(params, kP), kThreads, sizeof(Memory), params, stream, kOp,
                     chunk::make_maps(params, kOp));
}

template <int kN>
void launch_state_size(const SsmScanParams& params, cudaStream_t stream) {
  if (params.head_dim % kWholeChannels == 0) return launch<kN, kWholeChannels>(params, stream);
  launch<kN, kSharedChannels>(params, stream);
}

}  // namespace

bool can_scan_wide(const SsmScanParams& params) {
  const bool has_code =
      (params.state_size == 64 || params.state_size == 128) && can_scan_chunks(params) && runs_sm90a_code(kOp);
  if (!has_code) return false;
  if (params.head_dim % kWholeChannels == 0) return true;
  return params.head_dim % kSharedChannels == 0 && plan_tiles(params, kSharedChannels).num_segments > 1;
}

void launch_wide_scan(const SsmScanParams& params, cudaStream_t stream) {
  if (params.state_size == 64) return launch_state_size<64>(params, stream);
  launch_state_size<128>(params, stream);
}

}  // namespace headway::cuda
