// Attention for rows of few queries (decode, and verification of drafts) of any shape: bound by reading keys and
// values, so the work is cut along the keys. Each of a block's four warps streams a leaf of 64 keys at a time for 16
// packed rows (queries x heads that share a key head); the leaves of a step meet in shared memory, where all threads
// fold them, while the next keys are on their way. A block works through its piece of the launch's list of steps. All
// lengths are read on the device: a captured graph serves any.
#include "cuda/attention_block.cuh"
#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"

namespace headway::cuda {
namespace {

template <typename T, int kDim, bool kIsPadded>
__global__ void __launch_bounds__(kDecodeThreads, decode_blocks_per_multiprocessor(kDim))
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& memory = *reinterpret_cast<DecodeMemory<kDim>*>(shared);
  auto* prefix = reinterpret_cast<int32_t*>(shared + sizeof(memory));
  allow_next_kernel();
  prefix_rows(prefix, params.attention.rows.num_rows, [&](int r) { return num_steps_of(params, r); });
  const StepList list = make_list(params, count_rows(prefix, params.attention.rows.num_rows));
  DecodeBlock<T, kDim, kIsPadded> block(params, memory, prefix, list);
  if (list.num_steps == 0) return;
  const int begin = cut_of(params, list, prefix, static_cast<int>(blockIdx.x));
  const int end = cut_of(params, list, prefix, static_cast<int>(blockIdx.x) + 1);
  if (begin < end) block.attend(begin, end);
}

template <typename T, int kDim, bool kIsPadded>
void launch(DecodeParams params, cudaStream_t stream) {
  params.num_blocks = num_decode_blocks(params, decode_blocks_per_multiprocessor(kDim));
  const int shared_bytes = static_cast<int>(sizeof(DecodeMemory<kDim>)) + (params.attention.rows.num_rows + 1) * 4;
  auto* kernel = decode_kernel<T, kDim, kIsPadded>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), kAttentionOp);
  kernel<<<static_cast<unsigned>(params.num_blocks), kDecodeThreads, static_cast<size_t>(shared_bytes), stream>>>(
      params);
  check_launch(kAttentionOp);
  if (params.plan.max_steps > 1) launch_combine(params, stream);
}

template <typename T, int kDim>
void launch_padded(const DecodeParams& params, cudaStream_t stream) {
  if (params.attention.head_dim == kDim) return launch<T, kDim, false>(params, stream);
  launch<T, kDim, true>(params, stream);
}

template <typename T>
void launch_dtype(const DecodeParams& params, cudaStream_t stream) {
  switch (decode_dim(params.attention.head_dim)) {
    case 64:
      return launch_padded<T, 64>(params, stream);
    case 128:
      return launch_padded<T, 128>(params, stream);
    default:
      return launch_padded<T, 256>(params, stream);
  }
}

}  // namespace

void launch_decode_attention(const PagedAttentionParams& attention, cudaStream_t stream) {
  const DecodeParams params = make_decode_params(attention, plan_decode(attention));
  if (attention.dtype == DType::kBFloat16) {
    launch_dtype<__nv_bfloat16>(params, stream);
  } else {
    launch_dtype<__half>(params, stream);
  }
}

}  // namespace headway::cuda
