// The experts of a batch where most experts have several tokens, in three launches: the two products, each of which
// reads the weights of an expert once for up to 64 of its tokens, and the sums over the tokens' experts.
#include <algorithm>

#include "cuda/combine_experts.cuh"
#include "cuda/common/device.h"
#include "cuda/common/divide.h"
#include "cuda/common/sm90a_code.h"
#include "cuda/moe_warpgroup.cuh"
#include "cuda/moe_warpgroup.h"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

using namespace moe;

constexpr int kTileGroupRows = 8;  // rows of a panel that are gates, then those that they belong to
constexpr int kFewPairs = 20;  // an expert: so few rarely are more than half a chunk
constexpr int kStaticSharedBytes = 1024;
constexpr int64_t kElementBytes = 2;

// Boxes of 64 columns of 64 rows of [E rows, columns].
CUtensorMap map_rows(const void* base, int64_t num_rows, int columns) {
  const auto row_bytes = static_cast<uint64_t>(columns * kElementBytes);
  TensorBoxes boxes{};
  boxes.base = const_cast<void*>(base);
  boxes.sizes = {static_cast<uint64_t>(columns), static_cast<uint64_t>(num_rows), 1, 1};
  boxes.strides_bytes = {row_bytes, row_bytes, row_bytes};
  boxes.box = {wgmma::kPanelColumns, kGroupRows, 1, 1};
  return make_tensor_map(boxes, kMoeExpertsOp);
}

// Boxes of 64 columns of 32 gates and what they belong to, in turns of 8 rows: of [E, 2, F, columns], F a multiple of
// 8, seen as [groups of 8 rows, 2, 8, columns].
CUtensorMap map_gated_rows(const void* base, int64_t num_experts, int width, int columns) {
  const auto row_bytes = static_cast<uint64_t>(columns * kElementBytes);
  const auto num_groups = static_cast<uint64_t>((2 * num_experts - 1) * width / kTileGroupRows);
  TensorBoxes boxes{};
  boxes.base = const_cast<void*>(base);
  boxes.sizes = {static_cast<uint64_t>(columns), kTileGroupRows, 2, num_groups};
  boxes.strides_bytes = {row_bytes, width * row_bytes, kTileGroupRows * row_bytes};
  boxes.box = {wgmma::kPanelColumns, kTileGroupRows, 2, kGroupRows / (2 * kTileGroupRows)};
  return make_tensor_map(boxes, kMoeExpertsOp);
}

int64_t table_bytes(const MoeExpertsParams& params) {
  return PairTable::bytes(params.num_experts, params.num_tokens * params.top_k);
}

PanelWork plan(const MoeExpertsParams& params, int outputs, int columns, bool has_gates) {
  PanelWork work{};
  work.experts = params;
  work.columns = columns;
  work.outputs = outputs;
  work.part_outputs = has_gates ? kGroupRows / 2 : kGroupRows;
  work.num_tiles = divide_up(outputs, kGroups * work.part_outputs);
  const bool has_few_pairs = params.num_tokens * params.top_k <= int64_t{kFewPairs} * params.num_experts;
  work.chunk_pairs = has_few_pairs ? kMostChunkPairs / 2 : kMostChunkPairs;
  work.stage_bytes = kWeightBytes + work.chunk_pairs * wgmma::kPanelRowBytes;
  const int most_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kMoeExpertsOp);
  const int64_t ring_bytes = most_bytes - kStaticSharedBytes - table_bytes(params);
  work.num_stages = static_cast<int>(std::min<int64_t>(skinny::kMaxStages, ring_bytes / work.stage_bytes));
  return work;
}

template <typename T, bool kIsSecond>
void launch(const PanelWork& work, cudaStream_t stream) {
  const int64_t most_touched =
      std::min<int64_t>(work.experts.num_tokens * work.experts.top_k, work.experts.num_experts);
  const int num_multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, kMoeExpertsOp);
  const auto num_blocks =
      static_cast<unsigned>(std::clamp<int64_t>(most_touched * work.num_tiles, 1, num_multiprocessors));
  launch_chained_wide(kMoeExpertsOp, panel_kernel<T, kIsSecond>, dim3(num_blocks), kPanelThreads,
                      static_cast<int>(work.num_stages * work.stage_bytes + table_bytes(work.experts)), stream, work);
}

template <typename T>
void launch_dtype(const MoeExpertsParams& params, cudaStream_t stream) {
  PanelWork first = plan(params, params.width, params.hidden, params.is_gated);
  first.weight = params.is_gated ? map_gated_rows(params.w_in, params.num_experts, params.width, params.hidden)
                                 : map_rows(params.w_in, int64_t{params.num_experts} * params.width, params.hidden);
  launch<T, false>(first, stream);
  PanelWork second = plan(params, params.hidden, params.width, false);
  second.weight = map_rows(params.w_out, int64_t{params.num_experts} * params.hidden, params.width);
  launch<T, true>(second, stream);
  launch_combine<float, T>({.num_tokens = params.num_tokens,
                            .hidden = params.hidden,
                            .top_k = params.top_k,
                            .results = params.results,
                            .places = nullptr,
                            .weights = params.weights,
                            .out = params.out,
                            .dtype = params.dtype},
                           stream);
}

}  // namespace

bool has_warpgroup_experts() {
  return runs_sm90a_code(kMoeExpertsOp);
}

void launch_warpgroup_experts(const MoeExpertsParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kBFloat16) return launch_dtype<__nv_bfloat16>(params, stream);
  launch_dtype<__half>(params, stream);
}

}  // namespace headway::cuda
