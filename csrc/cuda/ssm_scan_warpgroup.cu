// ssm_scan for prompts on sm_90a: ssm_warpgroup.cuh's blocks over the items of ssm_scan_plan.cuh, the last few tokens
// of a row token by token (ssm_recurrence.cuh), and the launch. Heads of at least 64 channels in multiples of 16.
//
// What is bit-equal: as in ssm_scan_chunked.cu. The chunk grid lies on absolute positions, the tiles of a group
// are always the same.
#include "cuda/common/chained.cuh"
#include "cuda/common/sm90a_code.h"
#include "cuda/common/vector.cuh"
#include "cuda/common/wgmma_wide.cuh"
#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_scan.h"
#include "cuda/ssm_warpgroup.cuh"
#include "cuda/ssm_warpgroup_copies.cuh"
#include "cuda/ssm_warpgroup_plan.cuh"
#include "cuda/ssm_warpgroup_scores.cuh"
#include "cuda/ssm_warpgroup_tile.cuh"

namespace headway::cuda {
namespace {

using namespace warpgroup;

constexpr char kOp[] = "ssm_scan";

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A block's roles go through its items each at its own pace.
template <int kN, bool kStraddles>
__device__ __forceinline__ void scan_chunks(const SsmScanParams& params, const chunk::ScanPlan& plan,
                                            Shared<kN>& shared) {
  const int role = static_cast<int>(threadIdx.x) / kGroupThreads;
  unsigned turn = 0;
  if (role == 1) {
    wgmma::give_registers_back<kOtherRegisters>();
    clear_weights(shared);
    for_each_tile(params, plan, [&](const Work& work) {
      chunk::arrive_segment(plan);
      ScoreGroup<Shared<kN>>(work, shared).run(turn);
      chunk::wait_segments(plan);
    });
    wgmma::take_registers<kBlockRegisters>();
  } else if (role > 1) {
    wgmma::give_registers_back<kOtherRegisters>();
    for_each_tile(params, plan, [&](const Work& work) {
      CopyGroup<Shared<kN>> group(work, shared);
      group.prefetch_state();
      chunk::arrive_segment(plan);
      group.run(turn);
      chunk::wait_segments(plan);
    });
    wgmma::take_registers<kBlockRegisters>();
  } else {
    wgmma::take_registers<kTileRegisters>();
    for_each_tile(params, plan, [&](const Work& work) {
      TileGroup<Shared<kN>, kStraddles> group(work, shared);
      group.load();
      chunk::arrive_segment(plan);
      group.run_chunks(chunk::SnapshotCursor(work.params, work.item.row), turn);
      chunk::wait_segments(plan);
      if (work.item.is_last) group.store();
    });
    wgmma::give_registers_back<kBlockRegisters>();
  }
}

#endif

template <int kN, bool kStraddles>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroup_scan_kernel(const __grid_constant__ SsmScanParams params, const __grid_constant__ chunk::ScanPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kN>*>(shared_bytes);
  begin_chained_kernel([&] { shared.init_barriers(); });
  scan_chunks<kN, kStraddles>(params, plan, shared);
  scan_rests<kN>(params, plan, &shared);
#endif
}

// Launch ------------------------------------------------------------------------------------------------------------

template <int kN, bool kStraddles>
void launch(const SsmScanParams& params, cudaStream_t stream) {
  static_assert(sizeof(ScanTile<kN>) <= sizeof(Shared<kN>::stages), "the recurrence works where stages lie");
  const chunk::ScanPlan plan = chunk::plan_scan(params, count_row_tiles(params), /*resident_blocks=*/1, kOp);
  chunk::launch_plan(warpgroup_scan_kernel<kN, kStraddles>, plan, kThreads, sizeof(Shared<kN>), params, stream, kOp);
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
  if (prefers_paired_scan(params)) return launch_paired_scan(params, stream);
  if (params.state_size == 64) return launch_state_size<64>(params, stream);
  launch_state_size<128>(params, stream);
}

}  // namespace headway::cuda
