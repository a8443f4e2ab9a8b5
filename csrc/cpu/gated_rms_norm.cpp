// RMS norm of y * silu(z) over groups of channels: gate first, then norm.
#include <cmath>

#include "cpu/element.h"
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/variants.h"

namespace headway::cpu::HEADWAY_SIMD {
namespace {

constexpr int64_t kTile = 1024;  // gated values kept in L1 between the two passes; larger groups compute them twice

template <class T>
F32 gated_part(const T* y, const T* z, int64_t count) {
  return load_part(y, count) * silu(load_part(z, count));
}

template <class T>
void norm_group(const GatedRmsNormParams& params, int64_t token, int64_t group) {
  const int64_t size = params.group_size;
  const int64_t begin = group * size;
  const T* y = as<T>(params.y) + token * params.hidden + begin;
  const T* z = as<T>(params.z) + token * params.z_stride + begin;
  const T* weight = as<T>(params.weight) + begin;
  T* out = as<T>(params.out) + token * params.hidden + begin;

  alignas(64) float kept[kTile];
  F32 sum{};
  for (int64_t i = 0; i < size; i += kLanes) {
    const F32 gated = gated_part(y + i, z + i, size - i);
    sum = fma(gated, gated, sum);
    if (i + kLanes <= kTile) store(kept + i, gated);
  }
  const float mean = reduce_add(sum) / static_cast<float>(size);
  const F32 scale = broadcast(1.0f / std::sqrt(mean + params.eps));
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = size - i;
    const F32 gated = i + kLanes <= kTile ? load(kept + i) : gated_part(y + i, z + i, count);
    store_part(out + i, gated * scale * load_part(weight + i, count), count);
  }
}

}  // namespace

void gated_rms_norm(const GatedRmsNormParams& params) {
  const int64_t num_groups = params.hidden / params.group_size;
  constexpr int64_t kCostOfSilu = 8;
  with_element(params.dtype, [&]<class T>(T) {
    parallel_for(params.num_tokens * num_groups, params.num_tokens * params.hidden * kCostOfSilu,
                 [&](int64_t item) { norm_group<T>(params, item / num_groups, item % num_groups); });
  });
}

}  // namespace headway::cpu::HEADWAY_SIMD
