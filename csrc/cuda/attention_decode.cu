// Attention for rows of few queries (decode, and verification of drafts): bound by reading keys and values, so the work
// is cut along the keys. A block takes a stretch of one row's keys for all packed rows (queries x heads that share a
// key head) that fit its registers. One warp streams, four compute. All lengths are read on the device: a captured
// graph serves any.
#include "cuda/attention_warp.cuh"
#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"

namespace headway::cuda {
namespace {

// How the step's items are numbered: by row, cut, group of packed rows, key head.
struct ItemList {
  Cut cut;
  int64_t count;
};

template <typename Memory>
__device__ ItemList list_items(const DecodeParams& params, const Memory& memory) {
  const int num_rows = params.attention.rows.num_rows;
  const int num_kv_heads = params.attention.num_kv_heads;
  if (threadIdx.x / kWarpSize == 1) {
    int spans = 0;
    for (int r = static_cast<int>(threadIdx.x) % kWarpSize; r < num_rows; r += kWarpSize) {
      spans += num_units(params, r, Cut::kSpans);
    }
    spans = __reduce_add_sync(kFullWarp, spans);
    if (threadIdx.x % kWarpSize == 0) *memory.num_spans = spans;
  }
  prefix_rows(memory.prefix, num_rows, [&](int r) { return num_units(params, r, Cut::kSteps); });
  const int64_t step_items = static_cast<int64_t>(memory.prefix[num_rows]) * num_kv_heads;
  const Cut cut = choose_cut(params, step_items, static_cast<int64_t>(*memory.num_spans) * num_kv_heads);
  if (cut == Cut::kSteps) return {cut, step_items};
  __syncthreads();
  prefix_rows(memory.prefix, num_rows, [&](int r) { return num_units(params, r, cut); });
  return {cut, static_cast<int64_t>(memory.prefix[num_rows]) * num_kv_heads};
}

template <typename Memory>
__device__ DecodeItem find_item(const DecodeParams& params, const Memory& memory, Cut cut, int64_t index) {
  const int num_kv_heads = params.attention.num_kv_heads;
  const int unit = static_cast<int>(index / num_kv_heads);
  const int r = find_row(memory.prefix, params.attention.rows.num_rows, unit);
  const QueryRow row = query_row(params.attention, r);
  const int groups = num_groups(params, row);
  const int local = unit - memory.prefix[r];
  DecodeItem item{packed_rows(params, row, local % groups, static_cast<int>(index % num_kv_heads)), 0, row.kv_len};
  if (cut != Cut::kRows) {
    const int keys = cut_keys(params, cut);
    item.begin = local / groups * keys;
    item.end = min(item.begin + keys, row.kv_len);
  }
  return item;
}

template <typename T, int kDim, int kFragments>
__global__ void __launch_bounds__(kDecodeThreads, kResidentBlocks<kDim, kFragments>)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  using Memory = DecodeMemory<kDim, kFragments>;
  const Memory memory(shared);
  allow_next_kernel();
  if (threadIdx.x == 0) memory.ring.init();
  const ItemList items = list_items(params, memory);  // its barrier also shows the ring to everyone

  if (threadIdx.x >= kComputeThreads) {
    KeyValueStream<T, kDim, Memory::kSlots> stream(params, memory.ring, static_cast<int>(threadIdx.x) % kWarpSize);
    for (int64_t index = blockIdx.x; index < items.count; index += gridDim.x) {
      stream.stream(find_item(params, memory, items.cut, index));
    }
  } else {
    DecodeWarp<T, kDim, kFragments> warp(params, memory);
    for (int64_t index = blockIdx.x; index < items.count; index += gridDim.x) {
      warp.attend(find_item(params, memory, items.cut, index), index, items.cut);
    }
  }
}

template <typename T, int kDim, int kFragments>
void launch(DecodeParams params, cudaStream_t stream) {
  const PagedAttentionParams& attention = params.attention;
  int device = 0;
  int num_multiprocessors = 0;
  check(cudaGetDevice(&device), kAttentionOp);
  check(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device), kAttentionOp);
  const int64_t resident = std::min(kAttentionBlocks, kResidentBlocks<kDim, kFragments> * num_multiprocessors);
  const int64_t max_steps = (attention.max_kv_len + kStepKeys<kDim> - 1) / kStepKeys<kDim>;
  const int64_t groups = kMaxDecodeQueries * params.group / (kFragments * kFragmentRows) + 1;
  params.num_blocks = static_cast<int>(
      std::min(resident, attention.rows.num_rows * std::max<int64_t>(1, max_steps) * groups * attention.num_kv_heads));
  using Memory = DecodeMemory<kDim, kFragments>;
  const int shared_bytes = Memory::kBytes + (attention.rows.num_rows + 1) * 4;
  auto* kernel = decode_kernel<T, kDim, kFragments>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), kAttentionOp);
  kernel<<<static_cast<unsigned>(params.num_blocks), kDecodeThreads, shared_bytes, stream>>>(params);
  check_launch(kAttentionOp);
  if (max_steps > 1) launch_combine(params, stream);
}

template <typename T, int kDim>
void launch_fragments(const DecodeParams& params, cudaStream_t stream) {
  if (params.num_fragments == 1) return launch<T, kDim, 1>(params, stream);
  if (kDim > 128 || params.num_fragments == 2) return launch<T, kDim, 2>(params, stream);
  if constexpr (kDim <= 128) launch<T, kDim, 4>(params, stream);
}

template <typename T>
void launch_dtype(const DecodeParams& params, cudaStream_t stream) {
  switch (padded_head_dim(params.attention.head_dim)) {
    case 32:
      return launch_fragments<T, 32>(params, stream);
    case 64:
      return launch_fragments<T, 64>(params, stream);
    case 80:
      return launch_fragments<T, 80>(params, stream);
    case 96:
      return launch_fragments<T, 96>(params, stream);
    case 128:
      return launch_fragments<T, 128>(params, stream);
    case 192:
      return launch_fragments<T, 192>(params, stream);
    default:
      return launch_fragments<T, 256>(params, stream);
  }
}

}  // namespace

void launch_decode_attention(const PagedAttentionParams& attention, const AttentionWorkspace& plan,
                             cudaStream_t stream) {
  auto* bytes = static_cast<unsigned char*>(attention.workspace);
  const DecodeParams params{.attention = attention,
                            .group = attention.num_heads / attention.num_kv_heads,
                            .log2_scale = attention.scale * kLog2E,
                            .step_keys = decode_step_keys(padded_head_dim(attention.head_dim)),
                            .num_fragments = decode_fragments(attention),
                            .num_blocks = 0,
                            .plan = plan,
                            .partials = reinterpret_cast<float*>(bytes + plan.total_bytes),
                            .totals = bytes};
  if (attention.dtype == DType::kBFloat16) {
    launch_dtype<__nv_bfloat16>(params, stream);
  } else {
    launch_dtype<__half>(params, stream);
  }
}

}  // namespace headway::cuda
