// The kernel of attention_stream.cuh and its launch: heads of 128, cache blocks of a multiple of 16 tokens. All lengths
// are read on the device: a captured graph serves any.
#include "cuda/attention_stream.cuh"
#include "cuda/attention_stream_copies.cuh"
#include "cuda/attention_stream_rows.cuh"
#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"

namespace headway::cuda {
namespace {

using namespace stream;

template <typename T, int kDim, int kGroups>
__global__ void __launch_bounds__(kThreads, 1) stream_kernel(const __grid_constant__ StreamParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kDim, kGroups>*>(shared_bytes);
  auto* prefix = reinterpret_cast<int32_t*>(shared_bytes + sizeof(shared));
  if (threadIdx.x == 0) {
    prefetch_tensor_map(params.keys);
    prefetch_tensor_map(params.values);
    for (auto& lane : shared.lanes) {
      lane.tiles.init();
      Barrier{shared_address(&lane.turn)}.init(kGroupThreads);
    }
    Barrier::publish_inits();
  }
  wait_for_previous_kernel();
  allow_next_kernel();  // which reads rows that the one before may have written
  const DecodeParams& decode = params.decode;
  const int num_rows = decode.attention.rows.num_rows;
  prefix_rows(prefix, num_rows, [&](int r) { return num_steps_of(decode, r); });
  const StepList list = make_list(decode, count_rows(prefix, num_rows));
  if (list.num_steps == 0) return;
  constexpr int kLanes = kMaxStreamGroups / kGroups;
  const auto warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (warp < kLanes) {
    const auto block = static_cast<int>(blockIdx.x);
    const int index = list.cuts == Cuts::kTurns ? block : block * kLanes + warp;
    const int begin = cut_of(decode, list, prefix, index);
    const int end = cut_of(decode, list, prefix, index + 1);
    if (threadIdx.x % kWarpSize == 0) shared.lanes[warp].piece = {list, prefix, index, begin, end, warp};
  }
  __syncthreads();
  constexpr int kRowWarps = kMaxStreamGroups * kGroupWarps;
  if (warp >= kRowWarps) {
    wgmma::give_registers_back<kCopyRegisters>();
    if (warp >= kRowWarps + kLanes) return;
    CopyWarp<kDim, kGroups>(params, shared.lanes[warp - kRowWarps]).run();
  } else {
    wgmma::take_registers<kRowRegisters>();
    const int lane = warp / kGroupWarps / kGroups;
    RowGroup<T, kDim, kGroups>(params, shared.lanes[lane], shared.lanes[(lane + 1) % kLanes]).run();
  }
#endif
}

// Launch ------------------------------------------------------------------------------------------------------------

struct SharedSizes {
  int bytes;
  int num_chains;
  int chain_octets;
};

// As many chains as fit: of 57 packed rows and more only one, and of fewer where a step has many rows.
SharedSizes sizes_of(const PagedAttentionParams& attention, int lanes_bytes) {
  const int bytes = lanes_bytes + prefix_bytes(attention.rows.num_rows);
  const auto packed = static_cast<int>(std::min<int64_t>(max_packed_rows(attention), kStreamRows));
  const int num_octets = (packed + kOctetRows - 1) / kOctetRows;
  const int chain_bytes = num_octets * kOctetBytes;
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kAttentionOp);
  const int num_chains = std::min(kMaxStreamGroups, (limit - bytes) / chain_bytes);
  return {bytes + num_chains * chain_bytes, num_chains, num_octets};
}

template <typename T, int kDim, int kGroups>
void launch(DecodeParams decode, cudaStream_t stream) {
  const PagedAttentionParams& attention = decode.attention;
  constexpr int kLanes = kMaxStreamGroups / kGroups;
  const int num_blocks = num_decode_blocks(decode, 1);
  decode.num_blocks = num_blocks * kLanes;
  decode.num_lanes = kLanes;
  const int box_keys = box_keys_of(attention.cache.block_size, kKeys);
  const SharedSizes sizes = sizes_of(attention, static_cast<int>(sizeof(Shared<kDim, kGroups>)));
  const StreamParams params{decode,
                            map_cache<Tile<kDim>>(attention, attention.cache.keys, box_keys),
                            map_cache<Tile<kDim>>(attention, attention.cache.values, box_keys),
                            box_keys,
                            sizes.num_chains,
                            sizes.chain_octets};
  auto* kernel = stream_kernel<T, kDim, kGroups>;
  launch_chained_wide(kAttentionOp, kernel, dim3(static_cast<unsigned>(num_blocks)), kThreads, sizes.bytes, stream,
                      params);
  if (decode.plan.max_steps > 1) launch_combine(decode, stream);
}

template <typename T>
void launch_dtype(const DecodeParams& params, cudaStream_t stream) {
  if (num_stream_groups(params.attention) == 1) return launch<T, kStreamDim, 1>(params, stream);
  launch<T, kStreamDim, kMaxStreamGroups>(params, stream);
}

}  // namespace

void launch_stream_attention(const PagedAttentionParams& attention, cudaStream_t stream) {
  const DecodeParams params = make_decode_params(attention, plan_stream(attention));
  if (attention.dtype == DType::kBFloat16) {
    launch_dtype<__nv_bfloat16>(params, stream);
  } else {
    launch_dtype<__half>(params, stream);
  }
}

}  // namespace headway::cuda
