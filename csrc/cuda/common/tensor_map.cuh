// Copies of boxes of a tensor by the bulk copy engine (sm_90): the map that describes the tensor, made on the host, and
// the copy. PTX ISA, "Tensor copies"; CUDA driver API, "Tensor Map Object Management".
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/mbarrier.cuh"

namespace headway::cuda {

// A tensor of 16-bit elements and the boxes copied of it, innermost dimension first.
template <size_t kRank = 4>
struct TensorBoxes {
  void* base;  // 16-byte aligned
  std::array<uint64_t, kRank> sizes;  // beyond them, as before index 0, a copy writes zeros
  std::array<uint64_t, kRank - 1> strides_bytes;  // of dimensions 1 and up; multiples of 16
  std::array<uint32_t, kRank> box;  // box[0] elements are 128 bytes: a row of a panel of wgmma.cuh
  // What the second-level cache fetches at once.
  CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
};

// The driver's encoder, found at run time: nothing here links against the driver.
inline auto find_tensor_map_encoder(const char* op) {
  using Encoder = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                           const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result), op);
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result), op);
#endif
  require(result == cudaDriverEntryPointSuccess, op, "the driver has no tensor maps: it is older than CUDA 12.0");
  return reinterpret_cast<Encoder*>(function);
}

// Copies of the map write rows of 128 bytes with the swizzle of wgmma.cuh's panels.
template <size_t kRank>
CUtensorMap make_tensor_map(const TensorBoxes<kRank>& tensor, const char* op) {
  static const auto encode = find_tensor_map_encoder(op);
  std::array<uint32_t, kRank> element_strides;
  element_strides.fill(1);
  CUtensorMap map{};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, kRank, tensor.base, tensor.sizes.data(), tensor.strides_bytes.data(),
             tensor.box.data(), element_strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             tensor.promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, op, "cuTensorMapEncodeTiled refused the tensor: " + std::to_string(result));
  return map;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// One thread: fetches the map itself, before the first copy.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// One thread: copies the box at these indices; its bytes count at the barrier.
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap& map, const int (&indices)[4],
                                         Barrier barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(target),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(indices[0]), "r"(indices[1]), "r"(indices[2]), "r"(indices[3]),
      "r"(barrier.address)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap& map, const int (&indices)[5],
                                         Barrier barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], "
      "[%7];" ::"r"(target),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(indices[0]), "r"(indices[1]), "r"(indices[2]), "r"(indices[3]),
      "r"(indices[4]), "r"(barrier.address)
      : "memory");
}

// The same of what is read only once: it is the first to leave the second-level cache.
__device__ __forceinline__ void copy_box_once(uint32_t target, const CUtensorMap& map, const int (&indices)[4],
                                              Barrier barrier) {
  asm volatile(
      "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], policy; }" ::"r"(target),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(indices[0]), "r"(indices[1]), "r"(indices[2]), "r"(indices[3]),
      "r"(barrier.address)
      : "memory");
}

__device__ __forceinline__ void copy_box_once(uint32_t target, const CUtensorMap& map, const int (&indices)[5],
                                              Barrier barrier) {
  asm volatile(
      "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], policy; }" ::"r"(target),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(indices[0]), "r"(indices[1]), "r"(indices[2]), "r"(indices[3]),
      "r"(indices[4]), "r"(barrier.address)
      : "memory");
}

#endif

}  // namespace headway::cuda
