// Copies a step's keys and values into their rows' blocks, in 16-byte pieces where alignment allows. Rows that are
// padding or have stopped write block 0, the dummy.
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "kv_write";
constexpr int kThreads = 128;

// Element types do not matter to a copy: Piece is the unit, and every size and stride is counted in it.
struct KvCopy {
  int pieces;  // of a token's keys, and of its values
  int64_t k_stride;
  int64_t v_stride;
  int64_t block_stride;
};

template <typename Piece>
__global__ void __launch_bounds__(kThreads) kv_write_kernel(KvWriteParams params, KvCopy copy) {
  const int64_t token = blockIdx.x;
  const int row = params.rows[params.token_rows[token]];
  const int position = params.positions[token];
  const int block_size = params.cache.block_size;
  const int64_t block = params.cache.block_table[row * params.cache.table_stride + position / block_size];
  const int64_t target = block * copy.block_stride + static_cast<int64_t>(position % block_size) * copy.pieces;

  const auto* k = static_cast<const Piece*>(params.k) + token * copy.k_stride;
  const auto* v = static_cast<const Piece*>(params.v) + token * copy.v_stride;
  auto* keys = static_cast<Piece*>(params.cache.keys) + target;
  auto* values = static_cast<Piece*>(params.cache.values) + target;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * copy.pieces; i += kThreads) {
    if (i < copy.pieces) {
      keys[i] = k[i];
    } else {
      values[i - copy.pieces] = v[i - copy.pieces];
    }
  }
}

template <typename Piece, int kElements>
void launch(const KvWriteParams& params, cudaStream_t stream) {
  const KvCopy copy{params.num_kv_heads * params.head_dim / kElements, params.k_stride / kElements,
                    params.v_stride / kElements, params.cache.block_stride / kElements};
  kv_write_kernel<Piece><<<static_cast<unsigned>(params.num_tokens), kThreads, 0, stream>>>(params, copy);
}

}  // namespace

void kv_write(const KvWriteParams& params, Stream stream) {
  if (params.num_tokens == 0) return;
  require(params.num_tokens <= INT32_MAX, kOp, "num_tokens is too large for one launch");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const int64_t width = static_cast<int64_t>(params.num_kv_heads) * params.head_dim;
    const bool is_aligned = is_vectorisable<T>(params.k, params.k_stride, width) &&
                            is_vectorisable<T>(params.v, params.v_stride, width) &&
                            is_vectorisable<T>(params.cache.keys, params.cache.block_stride, width) &&
                            is_vectorisable<T>(params.cache.values, params.cache.block_stride, width);
    if (is_aligned) {
      launch<uint4, kVectorWidth<T>>(params, cuda_stream);
    } else {
      launch<T, 1>(params, cuda_stream);
    }
  });
  check_launch(kOp);
}

}  // namespace headway::cuda
