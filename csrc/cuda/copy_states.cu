// Copies whole states between slots, all layers and pools in one launch. Bound by memory: each thread moves pieces of
// 16 bytes where sizes allow, kUnroll of them in flight.
#include "cuda/common/check.h"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "copy_states";
constexpr int kThreads = 256;
constexpr int kUnroll = 8;

template <typename Piece>
__global__ void __launch_bounds__(kThreads) copy_states_kernel(CopyStatesParams params) {
  // Block -> (part of the slot, layer and pool, copy).
  const StateCopy copy = params.copies[blockIdx.z];
  const StatePool& pool = params.pools[blockIdx.y % params.num_pools];
  const int64_t num_pieces = pool.slot_bytes / static_cast<int64_t>(sizeof(Piece));
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
  if (copy.src_slot == copy.dst_slot || first >= num_pieces) return;
  uint8_t* layer = static_cast<uint8_t*>(pool.data) + blockIdx.y / params.num_pools * pool.layer_bytes;
  const auto* source = reinterpret_cast<const Piece*>(layer + copy.src_slot * pool.slot_bytes);
  auto* target = reinterpret_cast<Piece*>(layer + copy.dst_slot * pool.slot_bytes);
  Piece pieces[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (first + i * kThreads < num_pieces) pieces[i] = source[first + i * kThreads];
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (first + i * kThreads < num_pieces) target[first + i * kThreads] = pieces[i];
  }
}

// Whether every slot of every layer begins at a multiple of so many bytes and is a multiple of them long.
bool is_divisible(const CopyStatesParams& params, int64_t num_bytes) {
  for (int i = 0; i < params.num_pools; ++i) {
    const StatePool& pool = params.pools[i];
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(pool.data));
    if ((address | pool.layer_bytes | pool.slot_bytes) % num_bytes != 0) return false;
  }
  return true;
}

template <typename Piece>
void launch(const CopyStatesParams& params, int64_t max_slot_bytes, cudaStream_t stream) {
  constexpr int64_t kBlockBytes = static_cast<int64_t>(sizeof(Piece)) * kThreads * kUnroll;
  const int64_t num_parts = (max_slot_bytes + kBlockBytes - 1) / kBlockBytes;
  const int64_t num_layers = static_cast<int64_t>(params.num_layers) * params.num_pools;
  require(num_parts <= INT32_MAX && num_layers <= 65535 && params.num_copies <= 65535, kOp, "too much for one launch");
  const dim3 grid(static_cast<unsigned>(num_parts), static_cast<unsigned>(num_layers),
                  static_cast<unsigned>(params.num_copies));
  copy_states_kernel<Piece><<<grid, kThreads, 0, stream>>>(params);
  check_launch(kOp);
}

}  // namespace

void copy_states(const CopyStatesParams& params, Stream stream) {
  int64_t max_slot_bytes = 0;
  for (int i = 0; i < params.num_pools; ++i) {
    if (params.pools[i].slot_bytes > max_slot_bytes) max_slot_bytes = params.pools[i].slot_bytes;
  }
  if (params.num_copies == 0 || params.num_layers == 0 || max_slot_bytes == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (is_divisible(params, sizeof(uint4))) return launch<uint4>(params, max_slot_bytes, cuda_stream);
  if (is_divisible(params, sizeof(uint32_t))) return launch<uint32_t>(params, max_slot_bytes, cuda_stream);
  launch<uint8_t>(params, max_slot_bytes, cuda_stream);
}

}  // namespace headway::cuda
