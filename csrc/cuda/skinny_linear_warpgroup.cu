// The launch of skinny_linear_warpgroup.cuh.
#include <algorithm>

#include "cuda/common/device.h"
#include "cuda/common/divide.h"
#include "cuda/common/sm90a_code.h"
#include "cuda/skinny_linear.h"
#include "cuda/skinny_linear_warpgroup.cuh"

namespace headway::cuda {
namespace {

using namespace skinny;

// Of the ring; the rest of a multiprocessor's 227 KiB is left to the short kernels between two products.
constexpr int kRingBytes = 160 * 1024;
constexpr int kMinBlockRows = 48;  // a panel costs some 200 ns however few its rows: skinny_linear_short.cuh
constexpr int kPanelAlignment = 1024;
constexpr int kMaxGroupRows = kMaxRowTiles * kTileRows;
constexpr int64_t kElementBytes = 2;

// Boxes of 64 columns of `box_rows` rows.
CUtensorMap map_rows(const void* base, int num_columns, int num_rows, int64_t stride, int box_rows) {
  const auto row_bytes = static_cast<uint64_t>(stride * kElementBytes);
  TensorBoxes boxes{};
  boxes.base = const_cast<void*>(base);
  boxes.sizes = {static_cast<uint64_t>(num_columns), static_cast<uint64_t>(num_rows), 1, 1};
  boxes.strides_bytes = {row_bytes, row_bytes, row_bytes};
  boxes.box = {wgmma::kPanelColumns, static_cast<uint32_t>(box_rows), 1, 1};
  return make_tensor_map(boxes, kSkinnyLinearOp);
}

// Rows are dealt out to one block a multiprocessor, as evenly as they go.
WarpgroupWork plan(const SkinnyLinearParams& params, int product_tokens) {
  WarpgroupWork work{};
  work.linear = params;
  const int block_rows =
      divide_up(params.num_outputs, device_attribute(cudaDevAttrMultiProcessorCount, kSkinnyLinearOp));
  work.num_groups = divide_up(block_rows, kMaxGroupRows);
  work.group_rows = divide_up(block_rows, work.num_groups);
  const int64_t x_stride = params.num_tokens == 1 ? params.num_inputs : params.x_stride;
  work.weight = map_rows(params.weight, params.num_inputs, params.num_outputs, params.num_inputs, work.group_rows);
  work.x = map_rows(params.x, params.num_inputs, params.num_tokens, x_stride, product_tokens);
  work.weight_bytes = divide_up(work.group_rows * wgmma::kPanelRowBytes, kPanelAlignment) * kPanelAlignment;
  work.stage_bytes = work.weight_bytes + product_tokens * wgmma::kPanelRowBytes;
  work.num_stages = std::min(kMaxStages, kRingBytes / work.stage_bytes);
  return work;
}

template <typename T, int kTokens, int kRowTiles>
void launch(const WarpgroupWork& work, cudaStream_t stream) {
  const auto num_blocks = static_cast<unsigned>(divide_up(work.linear.num_outputs, work.num_groups * work.group_rows));
  // The last panel's products read whole tiles.
  constexpr int kTileBytes = kTileRows * wgmma::kPanelRowBytes;
  const int behind = std::max(0, kRowTiles * kTileBytes - work.stage_bytes);
  launch_chained_wide(kSkinnyLinearOp, warpgroup_linear_kernel<T, kTokens, kRowTiles>, dim3(num_blocks), kThreads,
                      work.num_stages * work.stage_bytes + behind, stream, work);
}

template <typename T, int kTokens>
void launch_tokens(const SkinnyLinearParams& params, cudaStream_t stream) {
  const WarpgroupWork work = plan(params, kTokens);
  switch (divide_up(work.group_rows, kTileRows)) {
    case 1:
      return launch<T, kTokens, 1>(work, stream);
    case 2:
      return launch<T, kTokens, 2>(work, stream);
    case 3:
      return launch<T, kTokens, 3>(work, stream);
    default:
      return launch<T, kTokens, 4>(work, stream);
  }
}

template <typename T>
void launch_dtype(const SkinnyLinearParams& params, cudaStream_t stream) {
  if (params.num_tokens <= 8) return launch_tokens<T, 8>(params, stream);
  if (params.num_tokens <= 16) return launch_tokens<T, 16>(params, stream);
  if (params.num_tokens <= 32) return launch_tokens<T, 32>(params, stream);
  launch_tokens<T, 64>(params, stream);
}

}  // namespace

bool can_multiply_warpgroups(const SkinnyLinearParams& params) {
  if (!runs_sm90a_code(kSkinnyLinearOp)) return false;
  const int num_multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, kSkinnyLinearOp);
  return is_large_matrix(params) && params.num_outputs >= kMinBlockRows * num_multiprocessors;
}

void launch_warpgroup_linear(const SkinnyLinearParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kBFloat16) return launch_dtype<__nv_bfloat16>(params, stream);
  launch_dtype<__half>(params, stream);
}

}  // namespace headway::cuda
