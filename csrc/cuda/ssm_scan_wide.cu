// ssm_scan for prompts on sm_90a: ssm_wide.cuh's blocks over the items of ssm_scan_plan.cuh, the last few tokens of a
// row token by token (ssm_recurrence.cuh), and the launch. Heads of multiples of 80 channels.
//
// What is bit-equal: as in ssm_scan_chunked.cu.
#include "cuda/common/device.h"
#include "cuda/common/sm90a_code.h"
#include "cuda/common/vector.cuh"
#include "cuda/common/wgmma_wide.cuh"
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
constexpr int kTileChannels = 80;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// visit(work) for the block's items that have chunks, and where in the rings each begins.
template <int kP, typename Visit>
__device__ __forceinline__ void for_each_work(const SsmScanParams& params, const Maps& maps, const ScanPlan& plan,
                                              Visit&& visit) {
  const int head_tiles = params.head_dim / kP;
  Place start;
  chunk::for_each_item(params.rows, plan, [&](const ScanItem& item) {
    if (!item.has_chunks()) return;
    const int head = item.index / head_tiles;
    visit(Work{params, maps, item, head, head * params.head_dim + item.index % head_tiles * kP}, start);
    start.turn += item.end;
    start.output += item.end - item.first_output;
  });
}

// A block's roles go through its items each at its own pace.
template <int kN, int kP>
__device__ __forceinline__ void scan_chunks(const SsmScanParams& params, const Maps& maps, const ScanPlan& plan,
                                            Shared<kN, kP>& shared) {
  const int role = static_cast<int>(threadIdx.x) / kGroupThreads;
  if (role == 1) {
    for_each_work<kP>(params, maps, plan, [&](const Work& work, Place start) {
      StateGroup<kN, kP> group(work, shared);
      group.load(work.source());
      chunk::arrive_segment(plan);
      group.run(chunk::SnapshotCursor(params, work.item.row), start);
      chunk::wait_segments(plan);
      if (work.item.is_last) group.store(work.target());
    });
  } else if (role == 0) {
    wgmma::give_registers_back<kCopyRegisters>();
    for_each_work<kP>(params, maps, plan, [&](const Work& work, Place start) {
      CopyGroup<kN, kP> group(work, shared);
      group.prefetch_state(work.source());
      chunk::arrive_segment(plan);
      group.run(start);
      chunk::wait_segments(plan);
    });
    wgmma::take_registers<kStateRegisters>();
  } else {
    wgmma::take_registers<kOutputRegisters>();
    for_each_work<kP>(params, maps, plan, [&](const Work& work, Place start) {
      chunk::arrive_segment(plan);
      OutputGroup<kN, kP>(work, shared).run(start);
      chunk::wait_segments(plan);
    });
    wgmma::give_registers_back<kStateRegisters>();
  }
}

// What chunks leave of the block's rows.
template <int kN, int kP>
__device__ __forceinline__ void scan_rests(const SsmScanParams& params, const ScanPlan& plan, Shared<kN, kP>& shared) {
  const int head_tiles = params.head_dim / kP;
  chunk::for_each_item(params.rows, plan, [&](const ScanItem& item) {
    if (!item.has_rest() || !item.is_last) return;
    __syncthreads();  // the row's state is in its slot, and the stages are free
    chunk::scan_rest<kN>(params, item.row, item.index / head_tiles, item.index % head_tiles * kP, kP, &shared);
  });
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
  scan_chunks<kN, kP>(params, maps, plan, shared);
  scan_rests<kN, kP>(params, plan, shared);
#endif
}

// Launch ------------------------------------------------------------------------------------------------------------

template <int kN>
void launch(const SsmScanParams& params, cudaStream_t stream) {
  using Memory = Shared<kN, kTileChannels>;
  static_assert(sizeof(ScanTile<kN>) <= sizeof(Memory::stages), "the recurrence works where stages lie");
  const int row_items = params.num_heads * params.head_dim / kTileChannels;
  const ScanPlan plan = chunk::plan_scan(params, row_items, /*resident_blocks=*/1, kOp);
  chunk::launch_plan(wide_scan_kernel<kN, kTileChannels>, plan, kThreads, sizeof(Memory), params, stream, kOp,
                     chunk::make_maps(params, kOp));
}

}  // namespace

bool can_scan_wide(const SsmScanParams& params) {
  return (params.state_size == 64 || params.state_size == 128) && params.head_dim % kTileChannels == 0 &&
         can_scan_chunks(params) && runs_sm90a_code(kOp);
}

void launch_wide_scan(const SsmScanParams& params, cudaStream_t stream) {
  if (params.state_size == 64) return launch<64>(params, stream);
  launch<128>(params, stream);
}

}  // namespace headway::cuda
