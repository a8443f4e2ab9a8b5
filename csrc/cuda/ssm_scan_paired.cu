// ssm_scan for many prompts on sm_90a: ssm_paired.cuh's blocks over the items of ssm_scan_plan.cuh, the last few
// tokens of a row token by token (ssm_recurrence.cuh), and the launch. Heads of multiples of 64 channels.
//
// What is bit-equal: as in ssm_scan_chunked.cu, and to ssm_scan_warpgroup.cu.
#include "cuda/common/chained.cuh"
#include "cuda/common/device.h"
#include "cuda/common/wgmma_wide.cuh"
#include "cuda/ssm_paired.cuh"
#include "cuda/ssm_scan.h"
#include "cuda/ssm_warpgroup_plan.cuh"
#include "cuda/ssm_warpgroup_tile.cuh"

namespace headway::cuda {
namespace {

using namespace warpgroup;

constexpr char kOp[] = "ssm_scan";

// Two blocks side by side take so many times as long as one of ssm_scan_warpgroup.cu alone; measured on an H200.
constexpr double kPairCost = 1.86;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kN>
__device__ __forceinline__ void scan_chunks(const SsmScanParams& params, const chunk::Maps& maps,
                                            const chunk::ScanPlan& plan, paired::BlockShared<kN>& shared) {
  using Memory = paired::BlockShared<kN>;
  unsigned turn = 0;
  if (threadIdx.x >= kGroupThreads) {
    wgmma::give_registers_back<paired::kScoreRegisters>();
    clear_weights(shared);
    for_each_tile(params, plan, [&](const Work& work) { paired::ScoreGroup<Memory>(work, maps, shared).run(turn); });
    wgmma::take_registers<paired::kBlockRegisters>();
  } else {
    wgmma::take_registers<paired::kTileRegisters>();
    for_each_tile(params, plan, [&](const Work& work) {
      TileGroup<Memory, false> group(work, shared);
      group.load();
      group.run_chunks(chunk::SnapshotCursor(work.params, work.item.row), turn);
      group.store();
    });
    wgmma::give_registers_back<paired::kBlockRegisters>();
  }
}

#endif

template <int kN>
__global__ void __launch_bounds__(paired::kBlockThreads, paired::kResidentBlocks)
    paired_scan_kernel(const __grid_constant__ SsmScanParams params, const __grid_constant__ chunk::Maps maps,
                       const __grid_constant__ chunk::ScanPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<paired::BlockShared<kN>*>(shared_bytes);
  begin_chained_kernel([&] {
    chunk::prefetch_maps(maps);
    shared.init_barriers();
  });
  scan_chunks<kN>(params, maps, plan, shared);
  scan_rests<kN>(params, plan, &shared);
#endif
}

template <int kN>
void launch(const SsmScanParams& params, cudaStream_t stream) {
  using Memory = paired::BlockShared<kN>;
  static_assert(sizeof(ScanTile<kN>) <= sizeof(Memory::stages), "the recurrence works where stages lie");
  const chunk::ScanPlan plan = chunk::plan_scan(params, count_row_tiles(params), paired::kResidentBlocks, kOp);
  chunk::launch_plan(paired_scan_kernel<kN>, plan, paired::kBlockThreads, sizeof(Memory), params, stream, kOp,
                     chunk::make_maps(params, kOp));
}

}  // namespace

// By waves of blocks, of which the last costs as much as a full one.
bool prefers_paired_scan(const SsmScanParams& params) {
  if (params.head_dim % kTileChannels != 0) return false;
  const int num_processors = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  const int num_pairs = num_processors * paired::kResidentBlocks;
  const int num_items = chunk::plan_scan(params, count_row_tiles(params), 1, kOp).num_items;
  const auto count_waves = [&](int blocks) { return (num_items + blocks - 1) / blocks; };
  return count_waves(num_pairs) * kPairCost < count_waves(num_processors);
}

void launch_paired_scan(const SsmScanParams& params, cudaStream_t stream) {
  if (params.state_size == 64) return launch<64>(params, stream);
  launch<128>(params, stream);
}

}  // namespace headway::cuda
