// Element-wise activations, gated or not.
#include <algorithm>

#include "cpu/activate.h"
#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/variants.h"

namespace headway::cpu::HEADWAY_SIMD {
namespace {

constexpr int64_t kBlock = 1024;

template <class T, Activation kKind>
void activate_block(const ActivationParams& params, int64_t token, int64_t begin) {
  const int64_t count = std::min(kBlock, params.width - begin);
  const T* x = as<T>(params.x) + token * params.x_stride + begin;
  const T* up = x + params.width;
  T* out = as<T>(params.out) + token * params.width + begin;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t part = count - i;
    const F32 value = activate<kKind>(load_part(x + i, part));
    store_part(out + i, params.is_gated ? value * load_part(up + i, part) : value, part);
  }
}

template <class T, Activation kKind>
void activate_all(const ActivationParams& params) {
  constexpr int64_t kCost = kKind == Activation::kRelu2 ? 1 : 8;
  const int64_t blocks = (params.width + kBlock - 1) / kBlock;
  parallel_for(params.num_tokens * blocks, params.num_tokens * params.width * kCost,
               [&](int64_t item) { activate_block<T, kKind>(params, item / blocks, item % blocks * kBlock); });
}

}  // namespace

void activation(const ActivationParams& params) {
  with_element(params.dtype, [&]<class T>(T) {
    with_activation(params.activation, [&]<Activation kKind>(Kind<kKind>) { activate_all<T, kKind>(params); });
  });
}

}  // namespace headway::cpu::HEADWAY_SIMD
