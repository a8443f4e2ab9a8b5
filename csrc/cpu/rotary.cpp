// Rotary embedding in place, NeoX pairing: channel i turns with channel i + rotary_dim / 2.
#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/variants.h"

namespace headway::cpu::HEADWAY_SIMD {
namespace {

template <class T>
void rotate_head(T* head, const float* cos_sin, int half) {
  for (int i = 0; i < half; i += kLanes) {
    const int part = half - i;
    const F32 cosine = load_part(cos_sin + i, part);
    const F32 sine = load_part(cos_sin + half + i, part);
    const F32 first = load_part(head + i, part);
    const F32 second = load_part(head + half + i, part);
    store_part(head + i, fma(first, cosine, -(second * sine)), part);
    store_part(head + half + i, fma(second, cosine, first * sine), part);
  }
}

template <class T>
void rotate_token(const RotaryParams& params, int64_t token) {
  const int half = params.rotary_dim / 2;
  const float* cos_sin = params.cos_sin + int64_t{params.positions[token]} * params.rotary_dim;
  T* q = as<T>(params.q) + token * params.q_stride;
  T* k = as<T>(params.k) + token * params.k_stride;
  for (int head = 0; head < params.num_heads; ++head) rotate_head(q + head * params.head_dim, cos_sin, half);
  for (int head = 0; head < params.num_kv_heads; ++head) rotate_head(k + head * params.head_dim, cos_sin, half);
}

}  // namespace

void rotary(const RotaryParams& params) {
  const int64_t cost = params.num_tokens * (params.num_heads + params.num_kv_heads) * params.rotary_dim;
  with_element(params.dtype, [&]<class T>(T) {
    parallel_for(params.num_tokens, cost, [&](int64_t token) { rotate_token<T>(params, token); });
  });
}

}  // namespace headway::cpu::HEADWAY_SIMD
