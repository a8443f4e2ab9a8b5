// x of a chunk as operand [64 channels, 64 tokens] of the products of ssm_warpgroup_tile.cuh, as it is and weighed: by
// the tile's warpgroup or, for it, by the copies'. Warp w of either holds 16 channels.
#pragma once

#include "cuda/ssm_warpgroup.cuh"

namespace headway::cuda::warpgroup {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

inline constexpr int kBlockBytes = kBlock * wgmma::kPanelRowBytes;

// Where a lane's row of its warp's first block of x lies; 16 tokens on, the swizzle is the same. thread: of the group.
__device__ __forceinline__ uint32_t cell_bytes(int thread) {
  const chunk::LaneCell cell = chunk::columns_first(thread % kWarpSize);
  return wgmma::panel_offset(cell.row, thread / kWarpSize * kBlock + cell.column) * sizeof(Bf16);
}

// 16 channels a warp, 16 tokens a block.
__device__ __forceinline__ void load_x(const Panel& panel, int thread, uint32_t (&x)[kNumBlocks][4]) {
  const uint32_t first = shared_address(&panel) + cell_bytes(thread);
#pragma unroll
  for (int j = 0; j < kNumBlocks; ++j) load_matrices_transposed(x[j], first + j * kBlockBytes);
}

// e^(cs_L - cs_j) dt_j x_j
__device__ __forceinline__ void weigh_x(const Decays& decays, int thread, const uint32_t (&x)[kNumBlocks][4],
                                        uint32_t (&weighed)[kNumBlocks][4]) {
#pragma unroll
  for (int j = 0; j < kNumBlocks; ++j) {
    const int token = j * kBlock + thread % 4 * 2;
    const float2 near = *reinterpret_cast<const float2*>(&decays.to_end[token]);
    const float2 far = *reinterpret_cast<const float2*>(&decays.to_end[token + 8]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 weight = i < 2 ? near : far;
      weighed[j][i] = pack_pair<Bf16>(chunk::low_bf16(x[j][i]) * weight.x, chunk::high_bf16(x[j][i]) * weight.y);
    }
  }
}

__device__ __forceinline__ void store_weighed(WeighedTile& tile, int thread, const uint32_t (&weighed)[kNumBlocks][4]) {
#pragma unroll
  for (int j = 0; j < kNumBlocks; ++j) {
    tile.words[thread / kWarpSize][j][thread % kWarpSize] = {weighed[j][0], weighed[j][1], weighed[j][2],
                                                             weighed[j][3]};
  }
}

__device__ __forceinline__ void load_weighed(const WeighedTile& tile, int thread, uint32_t (&weighed)[kNumBlocks][4]) {
#pragma unroll
  for (int j = 0; j < kNumBlocks; ++j) {
    const uint4 words = tile.words[thread / kWarpSize][j][thread % kWarpSize];
    weighed[j][0] = words.x;
    weighed[j][1] = words.y;
    weighed[j][2] = words.z;
    weighed[j][3] = words.w;
  }
}

#endif

}  // namespace headway::cuda::warpgroup
