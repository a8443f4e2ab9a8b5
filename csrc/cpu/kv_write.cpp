// Copies a step's keys and values into their rows' blocks. No arithmetic, so one build serves every SIMD level.
#include <cstring>

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace headway::cpu {
namespace {

struct Bytes {
  size_t element;
  size_t token;
};

void write_token(const KvWriteParams& params, const Bytes& bytes, int64_t token) {
  const KvCache& cache = params.cache;
  const int32_t position = params.positions[token];
  const int64_t row = params.rows[params.token_rows[token]];
  const int64_t block = cache.block_table[row * cache.table_stride + position / cache.block_size];
  const int64_t token_size = int64_t{params.num_kv_heads} * params.head_dim;
  const int64_t target = block * cache.block_stride + position % cache.block_size * token_size;
  std::memcpy(static_cast<char*>(cache.keys) + target * static_cast<int64_t>(bytes.element),
              static_cast<const char*>(params.k) + token * params.k_stride * static_cast<int64_t>(bytes.element),
              bytes.token);
  std::memcpy(static_cast<char*>(cache.values) + target * static_cast<int64_t>(bytes.element),
              static_cast<const char*>(params.v) + token * params.v_stride * static_cast<int64_t>(bytes.element),
              bytes.token);
}

}  // namespace

void kv_write(const KvWriteParams& params, Stream) {
  const size_t element = params.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t token_size = int64_t{params.num_kv_heads} * params.head_dim;
  const Bytes bytes{element, static_cast<size_t>(token_size) * element};
  parallel_for(params.num_tokens, params.num_tokens * token_size,
               [&](int64_t token) { write_token(params, bytes, token); });
}

}  // namespace headway::cpu
