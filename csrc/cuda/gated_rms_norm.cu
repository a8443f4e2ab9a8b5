// RMS norm over groups of y * silu(z), the norm behind a Mamba-2 mixer. A team of threads has one token's group, the
// gated values in registers between the two passes. Its size, and so the order of the sum, depends on the group's width
// alone. Instructions bind long prompts as much as memory: no index is divided, and of wide teams a thread has two
// roles.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/row_shape.h"
#include "cuda/gated_norm.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "gated_rms_norm";
constexpr int kMinBlockThreads = 128;  // the device starts so many blocks a microsecond and no more
constexpr int kMaxBlockTeams = kMinBlockThreads / kWarpSize;
constexpr int kMaxGridY = 65535;
// From so many warps a team and tokens on, a thread has two roles: fewer tokens do not fill the chip with half the
// warps.
constexpr int kWideTeamWarps = 8;
constexpr int kManyTokens = 1024;

// The same for all teams.
struct Teams {
  int num_groups;  // of a token
  int num_pieces;  // of a group
  int num_warps;  // of a team whose threads have one role each
};

// Over a team, in the order of block_sum over a block of num_warps warps. Role r of a thread is that of the thread
// r * blockDim.x further. The whole block calls it.
template <int kRoles>
__device__ __forceinline__ float team_sum(const float (&sums)[kRoles], int num_warps) {
  __shared__ float scratch[kMaxBlockTeams][kWarpSize];
  float warp_sums[kRoles];
#pragma unroll
  for (int role = 0; role < kRoles; ++role) warp_sums[role] = warp_sum(sums[role]);
  if (kRoles == 1 && num_warps == 1) return warp_sums[0];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (lane == 0) {
#pragma unroll
    for (int role = 0; role < kRoles; ++role) {
      scratch[threadIdx.y][(role * blockDim.x + threadIdx.x) / kWarpSize] = warp_sums[role];
    }
  }
  __syncthreads();
  return warp_sum(lane < num_warps ? scratch[threadIdx.y][lane] : 0.0f);
}

// Blocks are some of a token's groups, a team along x each; tokens follow each other along y, then z. A thread has
// kItems pieces, or one in each of its kRoles roles.
template <typename T, int kWidth, int kItems, int kRoles>
__global__ void __launch_bounds__(max_row_threads(kItems* kRoles, kWidth))
    gated_rms_norm_kernel(GatedRmsNormParams params, Teams teams) {
  static_assert(kItems == 1 || kRoles == 1);
  constexpr int kPieces = kItems * kRoles;
  constexpr int kBatch = kPieces % 2 == 0 ? 2 : 1;  // pieces on their way at once
  using Piece = VectorBits<T, kWidth>;
  allow_next_kernel();
  const int64_t token = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  const auto group = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);
  const int num_pieces = token < params.num_tokens && group < teams.num_groups ? teams.num_pieces : 0;
  const int64_t first = group * params.group_size + threadIdx.x * kWidth;
  const auto step = static_cast<int>(blockDim.x);  // pieces between a thread's
  const auto is_piece = [&](int i) { return i * step + static_cast<int>(threadIdx.x) < num_pieces; };
  const auto load = [&](const void* source, int64_t offset, int i) {
    return *reinterpret_cast<const Piece*>(static_cast<const T*>(source) + offset + first + i * step * kWidth);
  };

  Piece weights[kPieces];  // no kernel writes them: loaded before the one ahead is over
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (is_piece(i)) weights[i] = load(params.weight, 0, i);
  }
  wait_for_previous_kernel();
  float values[kPieces][kWidth];
  float sums[kRoles] = {};
#pragma unroll
  for (int begin = 0; begin < kPieces; begin += kBatch) {
    Piece y[kBatch];
    Piece z[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!is_piece(begin + i)) break;
      y[i] = load(params.y, token * params.hidden, begin + i);
      z[i] = load(params.z, token * params.z_stride, begin + i);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!is_piece(begin + i)) break;
      float& sum = sums[kRoles == 1 ? 0 : begin + i];
      sum = gate_piece(as_vector<T, kWidth>(y[i]), as_vector<T, kWidth>(z[i]), values[begin + i], sum);
    }
  }

  const float scale = norm_scale(team_sum(sums, teams.num_warps), params.group_size, params.eps);

  T* out = static_cast<T*>(params.out) + token * params.hidden + first;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (is_piece(i)) store_normalised(out + i * step * kWidth, as_vector<T, kWidth>(weights[i]), values[i], scale);
  }
}

template <typename T, int kWidth, int kItems, int kRoles>
void launch_teams(const GatedRmsNormParams& params, Teams teams, cudaStream_t stream) {
  const int team_threads = (teams.num_warps + kRoles - 1) / kRoles * kWarpSize;
  const int block_teams = std::clamp(kMinBlockThreads / team_threads, 1, teams.num_groups);
  const int64_t grid_y = std::min<int64_t>(params.num_tokens, kMaxGridY);
  const dim3 grid(static_cast<unsigned>((teams.num_groups + block_teams - 1) / block_teams),
                  static_cast<unsigned>(grid_y), static_cast<unsigned>((params.num_tokens + grid_y - 1) / grid_y));
  const dim3 block(static_cast<unsigned>(team_threads), static_cast<unsigned>(block_teams));
  launch_chained(kOp, gated_rms_norm_kernel<T, kWidth, kItems, kRoles>, grid, block, stream, params, teams);
}

template <typename T, int kWidth>
void launch_width(const GatedRmsNormParams& params, cudaStream_t stream) {
  const int64_t num_groups = params.hidden / params.group_size;
  require(params.num_tokens * num_groups <= INT32_MAX, kOp, "num_tokens * num_groups is too large for one launch");
  dispatch_row_shape<kWidth>(params.group_size, kOp, [&](auto items, int team_threads) {
    constexpr int kItems = decltype(items)::value;
    const Teams teams{static_cast<int>(num_groups), static_cast<int>(params.group_size / kWidth),
                      team_threads / kWarpSize};
    if constexpr (kItems == 1 && kWidth > 1) {
      if (teams.num_warps >= kWideTeamWarps && params.num_tokens >= kManyTokens) {
        return launch_teams<T, kWidth, kItems, 2>(params, teams, stream);
      }
    }
    launch_teams<T, kWidth, kItems, 1>(params, teams, stream);
  });
}

}  // namespace

void gated_rms_norm(const GatedRmsNormParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.hidden == 0) return;
  require(params.group_size > 0 && params.hidden % params.group_size == 0, kOp, "group_size must divide hidden");
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool is_aligned = is_vectorisable<T>(params.y, params.hidden, params.group_size) &&
                            is_vectorisable<T>(params.z, params.z_stride, params.group_size) &&
                            is_vectorisable<T>(params.weight, params.hidden, params.group_size) &&
                            is_vectorisable<T>(params.out, params.hidden, params.group_size);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (is_aligned) {
      launch_width<T, kVectorWidth<T>>(params, cuda_stream);
    } else {
      launch_width<T, 1>(params, cuda_stream);
    }
  });
}

}  // namespace headway::cuda
