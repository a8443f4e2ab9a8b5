// ssm_scan for prompts on sm_90a: ssm_warpgroup.cuh's blocks over rows and tiles of channels, the last few tokens of a
// row token by token (ssm_recurrence.cuh), and the launch. Heads of at least 64 channels in multiples of 16.
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

template <int kN, bool kStraddles>
__device__ __forceinline__ void scan_chunks(const Work& work, Shared<kN>& shared, unsigned& turn) {
  const int role = static_cast<int>(threadIdx.x) / kGroupThreads;
  if (role == 1) {
    wgmma::give_registers_back<kOtherRegisters>();
    ScoreGroup<Shared<kN>> group(work, shared);
    if (turn == 0) group.clear_weights();
    group.run(work.tokens, turn);
    wgmma::take_registers<kBlockRegisters>();
  } else if (role > 1) {
    wgmma::give_registers_back<kOtherRegisters>();
    CopyGroup<Shared<kN>>(work, shared).run(work.tokens, turn);
    wgmma::take_registers<kBlockRegisters>();
  } else {
    wgmma::take_registers<kTileRegisters>();
    TileGroup<Shared<kN>, kStraddles>(work, shared).run(turn);
    wgmma::give_registers_back<kBlockRegisters>();
  }
}

#endif

template <int kN, bool kStraddles>
__global__ void __launch_bounds__(kThreads, 1) warpgroup_scan_kernel(SsmScanParams params, TilePlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kN>*>(shared_bytes);
  begin_chained_kernel([&] { shared.init_barriers(); });
  unsigned turn = 0;
  scan_tiles<kN>(params, plan, &shared, [&](const Work& work) { scan_chunks<kN, kStraddles>(work, shared, turn); });
#endif
}

// Launch ------------------------------------------------------------------------------------------------------------

template <int kN, bool kStraddles>
void launch(const SsmScanParams& params, cudaStream_t stream) {
  static_assert(sizeof(ScanTile<kN>) <= sizeof(Shared<kN>::stages), "the recurrence works where stages lie");
  launch_tiles(warpgroup_scan_kernel<kN, kStraddles>, plan_tiles(params, kOp), kThreads, sizeof(Shared<kN>),
               /*resident_blocks=*/1, params, stream, kOp);
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
