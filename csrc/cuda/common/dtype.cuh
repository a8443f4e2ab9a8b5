// Element types of tensors: conversion to and from fp32, and dispatch from the run-time DType.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/check.h"
#include "params/common.h"

namespace headway::cuda {

__device__ __forceinline__ float to_float(float value) {
  return value;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ __forceinline__ float to_float(__half value) {
  return __half2float(value);
}

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

template <typename T>
struct TypeTag {
  using Type = T;
};

// Calls body(TypeTag<element type>) for the dtype.
template <typename Body>
void dispatch_dtype(DType dtype, const char* op, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(TypeTag<float>{});
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return body(TypeTag<__half>{});
  }
  require(false, op, "dtype must be float32, bfloat16 or float16");
}

// The same for states in slots.
template <typename Body>
void dispatch_state(DType dtype, const char* op, Body&& body) {
  if (dtype == DType::kFloat32) return body(TypeTag<float>{});
  if (dtype == DType::kFloat16) return body(TypeTag<__half>{});
  require(false, op, "state_dtype must be float32 or float16");
}

// The same for kernels that multiply on tensor cores.
template <typename Body>
void dispatch_half(DType dtype, const char* op, Body&& body) {
  if (dtype == DType::kBFloat16) return body(TypeTag<__nv_bfloat16>{});
  if (dtype == DType::kFloat16) return body(TypeTag<__half>{});
  require(false, op, "dtype must be bfloat16 or float16");
}

}  // namespace headway::cuda
