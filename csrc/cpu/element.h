// From a run-time dtype to a compile-time element type.
#pragma once

#include <stdexcept>

#include "cpu/simd.h"
#include "params/common.h"

namespace headway::cpu::HEADWAY_SIMD {

// Calls run(T{}) with T = float or BFloat16.
template <class Run>
inline void with_element(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat16:
      break;
  }
  throw std::invalid_argument("the CPU kernels take float32 and bfloat16");
}

template <class T>
inline const T* as(const void* address) {
  return static_cast<const T*>(address);
}

template <class T>
inline T* as(void* address) {
  return static_cast<T*>(address);
}

}  // namespace headway::cpu::HEADWAY_SIMD
