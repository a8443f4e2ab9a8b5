// The kernel of attention_warpgroup.cuh and its launch: heads of 64 or 128, cache blocks of a multiple of 16 tokens.
#include "cuda/attention_warpgroup.cuh"
#include "cuda/attention_warpgroup_copies.cuh"
#include "cuda/attention_warpgroup_rows.cuh"
#include "cuda/common/device.h"
#include "cuda/common/dtype.cuh"
#include "cuda/common/sm90a_code.h"

namespace headway::cuda {
namespace {

using namespace prefill;

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) warpgroup_kernel(const __grid_constant__ WarpgroupParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kDim>*>(shared_bytes);
  auto* prefix = reinterpret_cast<int32_t*>(shared_bytes + sizeof(shared));
  if (threadIdx.x == 0) {
    shared.keys.init();
    shared.values.init();
    shared.blocks.init();
    Barrier::publish_inits();
  }
  prefix_rows(prefix, params.prefill.attention.rows.num_rows,
              [&](int r) { return num_query_blocks<kBlockRows>(params.prefill, r); });
  const int role = static_cast<int>(threadIdx.x) / kGroupThreads;
  if (role == kRowGroups) {
    wgmma::give_registers_back<kCopyRegisters>();
    if (threadIdx.x / kWarpSize != kRowWarps) return;
    CopyWarp<kDim>(params, shared).run({params.prefill, prefix});
  } else {
    wgmma::take_registers<kRowRegisters>();
    RowGroup<T, kDim>(params, shared, role).run();
  }
#endif
}

// Launch ------------------------------------------------------------------------------------------------------------

template <typename T, int kDim>
void launch(const PrefillParams& prefill, unsigned* num_taken, cudaStream_t stream) {
  const PagedAttentionParams& attention = prefill.attention;
  const int box_keys = box_keys_of(attention.cache.block_size, kKeys);
  const WarpgroupParams params{prefill, map_cache<Tile<kDim>>(attention, attention.cache.keys, box_keys),
                               map_cache<Tile<kDim>>(attention, attention.cache.values, box_keys), box_keys, num_taken};
  const int64_t blocks = max_query_blocks<kBlockRows>(prefill) * attention.num_kv_heads;
  const int64_t resident = device_attribute(cudaDevAttrMultiProcessorCount, kAttentionOp);
  const auto num_blocks = static_cast<unsigned>(std::min(resident, blocks));
  const int shared_bytes = static_cast<int>(sizeof(Shared<kDim>)) + (attention.rows.num_rows + 1) * 4;
  const auto kernel = warpgroup_kernel<T, kDim>;
  check(cudaMemsetAsync(num_taken, 0, sizeof(*num_taken), stream), kAttentionOp);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), kAttentionOp);
  kernel<<<num_blocks, kThreads, static_cast<size_t>(shared_bytes), stream>>>(params);
  check_launch(kAttentionOp);
}

template <typename T>
void launch_dtype(const PrefillParams& params, unsigned* num_taken, cudaStream_t stream) {
  if (params.attention.head_dim == 64) return launch<T, 64>(params, num_taken, stream);
  launch<T, 128>(params, num_taken, stream);
}

}  // namespace

bool can_attend_warpgroups(const PagedAttentionParams& params) {
  return (params.head_dim == 64 || params.head_dim == 128) && box_keys_of(params.cache.block_size, kKeys) > 0 &&
         runs_sm90a_code(kAttentionOp);
}

void launch_warpgroup_attention(const PagedAttentionParams& attention, unsigned* num_taken, cudaStream_t stream) {
  const PrefillParams params{attention, attention.num_heads / attention.num_kv_heads, attention.scale * kLog2E};
  if (attention.dtype == DType::kBFloat16) {
    launch_dtype<__nv_bfloat16>(params, num_taken, stream);
  } else {
    launch_dtype<__half>(params, num_taken, stream);
  }
}

}  // namespace headway::cuda
