// What the copy engine fetches of a chunk: boxes of a scan's inputs, 64 columns wide, the chunk's tokens as rows.
#pragma once

#include "cuda/common/tensor_map.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/ssm_chunk_decays.cuh"

namespace headway::cuda::chunk {

struct Maps {
  CUtensorMap x;
  CUtensorMap B;
  CUtensorMap C;
};

// [num_tokens, num_columns] with rows `stride` apart.
inline CUtensorMap map_rows(const void* base, int64_t num_columns, int64_t num_tokens, int64_t stride, const char* op) {
  const auto stride_bytes = static_cast<uint64_t>(stride) * sizeof(Bf16);
  TensorBoxes boxes{};
  boxes.base = const_cast<void*>(base);
  boxes.sizes = {static_cast<uint64_t>(num_columns), static_cast<uint64_t>(num_tokens), 1, 1};
  boxes.strides_bytes = {stride_bytes, stride_bytes, stride_bytes};
  boxes.box = {wgmma::kPanelColumns, kTokens, 1, 1};
  return make_tensor_map(boxes, op);
}

inline Maps make_maps(const SsmScanParams& params, const char* op) {
  const int64_t states = static_cast<int64_t>(params.num_groups) * params.state_size;
  const int64_t channels = static_cast<int64_t>(params.num_heads) * params.head_dim;
  return {map_rows(params.x, channels, params.num_tokens, params.x_stride, op),
          map_rows(params.B, states, params.num_tokens, params.b_stride, op),
          map_rows(params.C, states, params.num_tokens, params.c_stride, op)};
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// One thread, before the first copy.
__device__ __forceinline__ void prefetch_maps(const Maps& maps) {
  for (const CUtensorMap* map : {&maps.x, &maps.B, &maps.C}) prefetch_tensor_map(*map);
}

#endif

}  // namespace headway::cuda::chunk
