// The launch of skinny_linear_short.cuh.
#include <algorithm>

#include "cuda/common/device.h"
#include "cuda/common/divide.h"
#include "cuda/common/sm90a_code.h"
#include "cuda/skinny_linear.h"
#include "cuda/skinny_linear_short.cuh"

namespace headway::cuda {
namespace {

using namespace skinny;

// Of the ring; the rest of a multiprocessor's 227 KiB is left to the short kernels between two products.
constexpr int kRingBytes = 160 * 1024;
constexpr int kMaxTiles = 6;
constexpr int kBoxAlignment = 1024;
constexpr int64_t kElementBytes = 2;

// Boxes of `box_panels` panels of `box_rows` rows.
CUtensorMap map_panels(const void* base, int num_columns, int num_rows, int64_t stride, int box_rows, int box_panels) {
  const auto row_bytes = static_cast<uint64_t>(stride * kElementBytes);
  const auto num_panels = static_cast<uint64_t>(num_columns / wgmma::kPanelColumns);
  TensorBoxes boxes{};
  boxes.base = const_cast<void*>(base);
  boxes.sizes = {wgmma::kPanelColumns, static_cast<uint64_t>(num_rows), num_panels, 1};
  boxes.strides_bytes = {row_bytes, kLineBytes, row_bytes};
  boxes.box = {wgmma::kPanelColumns, static_cast<uint32_t>(box_rows), static_cast<uint32_t>(box_panels), 1};
  return make_tensor_map(boxes, kSkinnyLinearOp);
}

int box_bytes(int num_lines) {
  return divide_up(num_lines * kLineBytes, kBoxAlignment) * kBoxAlignment;
}

int rows_of_block(int num_outputs) {
  return divide_up(num_outputs, device_attribute(cudaDevAttrMultiProcessorCount, kSkinnyLinearOp));
}

// Rows are dealt out to one block a multiprocessor, as evenly as they go.
ShortWork plan(const SkinnyLinearParams& params, int box_panels) {
  ShortWork work{};
  work.linear = params;
  work.block_rows = rows_of_block(params.num_outputs);
  work.box_panels = box_panels;
  const int64_t x_stride = params.num_tokens == 1 ? params.num_inputs : params.x_stride;
  work.weight =
      map_panels(params.weight, params.num_inputs, params.num_outputs, params.num_inputs, work.block_rows, box_panels);
  work.x = map_panels(params.x, params.num_inputs, params.num_tokens, x_stride, params.num_tokens, box_panels);
  work.weight_bytes = box_bytes(work.block_rows * box_panels);
  work.stage_bytes = work.weight_bytes + box_bytes(params.num_tokens * box_panels);
  work.num_stages = std::min(kMaxStages, kRingBytes / work.stage_bytes);
  return work;
}

template <typename T, int kTokens, int kTiles>
void launch(const SkinnyLinearParams& params, cudaStream_t stream) {
  const ShortWork work = plan(params, kBoxPanels<kTiles>);
  const auto num_blocks = static_cast<unsigned>(divide_up(params.num_outputs, work.block_rows));
  const int sums_bytes = sizeof(ShortSums<kTokens, kTiles>);
  launch_chained_wide(kSkinnyLinearOp, short_linear_kernel<T, kTokens, kTiles>, dim3(num_blocks),
                      kShortThreads + kWarpSize, std::max(sums_bytes, work.num_stages * work.stage_bytes), stream,
                      work);
}

template <typename T, int kTokens>
void launch_tokens(const SkinnyLinearParams& params, cudaStream_t stream) {
  const int num_tiles = divide_up(rows_of_block(params.num_outputs), kShortTileRows);
  if (num_tiles <= 3) return launch<T, kTokens, 3>(params, stream);
  if (num_tiles <= 5) return launch<T, kTokens, 5>(params, stream);
  launch<T, kTokens, kMaxTiles>(params, stream);
}

template <typename T>
void launch_dtype(const SkinnyLinearParams& params, cudaStream_t stream) {
  if (params.num_tokens <= 8) return launch_tokens<T, 8>(params, stream);
  if (params.num_tokens <= 16) return launch_tokens<T, 16>(params, stream);
  launch_tokens<T, 32>(params, stream);
}

}  // namespace

bool can_multiply_short(const SkinnyLinearParams& params) {
  return runs_sm90a_code(kSkinnyLinearOp) && params.num_inputs % wgmma::kPanelColumns == 0 && is_large_matrix(params) &&
         rows_of_block(params.num_outputs) <= kMaxTiles * kShortTileRows;
}

void launch_short_linear(const SkinnyLinearParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kBFloat16) return launch_dtype<__nv_bfloat16>(params, stream);
  launch_dtype<__half>(params, stream);
}

}  // namespace headway::cuda
