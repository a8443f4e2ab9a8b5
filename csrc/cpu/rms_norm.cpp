// RMS norm of each token, the residual added first where there is one.
#include <cmath>

#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/variants.h"

namespace headway::cpu::HEADWAY_SIMD {
namespace {

// residual += scale * x, rounded to T as it is stored: the norm is that of the stored value.
template <class T>
void add_residual(const T* x, T* residual, float scale, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = size - i;
    const F32 sum = fma(load_part(x + i, count), broadcast(scale), load_part(residual + i, count));
    store_part(residual + i, sum, count);
  }
}

template <class T>
float sum_of_squares(const T* x, int64_t size) {
  F32 sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    const F32 first = load(x + i);
    const F32 second = load(x + i + kLanes);
    sums[0] = fma(first, first, sums[0]);
    sums[1] = fma(second, second, sums[1]);
  }
  for (; i < size; i += kLanes) {
    const F32 value = load_part(x + i, size - i);
    sums[0] = fma(value, value, sums[0]);
  }
  return reduce_add(sums[0] + sums[1]);
}

template <class T>
void norm_token(const RmsNormParams& params, int64_t token) {
  const int64_t size = params.hidden;
  const T* x = as<T>(params.x) + token * params.x_stride;
  if (params.residual != nullptr) {
    T* residual = as<T>(params.residual) + token * size;
    add_residual(x, residual, params.residual_scale, size);
    x = residual;
  }
  const float mean = sum_of_squares(x, size) / static_cast<float>(size);
  const F32 scale = broadcast(1.0f / std::sqrt(mean + params.eps));
  const T* weight = as<T>(params.weight);
  T* out = as<T>(params.out) + token * size;
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = size - i;
    store_part(out + i, load_part(x + i, count) * scale * load_part(weight + i, count), count);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& params) {
  with_element(params.dtype, [&]<class T>(T) {
    parallel_for(params.num_tokens, params.num_tokens * params.hidden,
                 [&](int64_t token) { norm_token<T>(params, token); });
  });
}

}  // namespace headway::cpu::HEADWAY_SIMD
