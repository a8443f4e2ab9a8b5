// Sums and maxima over a warp or a block, in an order fixed by the block size alone.
#pragma once

namespace headway::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Every lane of each group of kLanes consecutive lanes gets the group's result.
template <typename Op, int kLanes = kWarpSize>
__device__ __forceinline__ float warp_reduce(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value = Op{}(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

template <int kLanes = kWarpSize>
__device__ __forceinline__ float warp_sum(float value) {
  return warp_reduce<Sum, kLanes>(value);
}

template <int kLanes = kWarpSize>
__device__ __forceinline__ float warp_max(float value) {
  return warp_reduce<Max, kLanes>(value);
}

// The result over the block's first num_warps warps, for the threads of these; the whole block calls it. `scratch`
// holds 32 floats and may be used again only after another barrier. `neutral` leaves the result unchanged.
template <typename Op>
__device__ __forceinline__ float block_reduce(float value, float neutral, float* scratch, int num_warps) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  value = warp_reduce<Op>(value);
  if (num_warps == 1) return value;
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_reduce<Op>(lane < num_warps ? scratch[lane] : neutral);
}

// Every thread gets the result. blockDim.x is a multiple of 32, at most 1024.
template <typename Op>
__device__ __forceinline__ float block_reduce(float value, float neutral, float* scratch) {
  return block_reduce<Op>(value, neutral, scratch, static_cast<int>(blockDim.x) / kWarpSize);
}

__device__ __forceinline__ float block_sum(float value, float* scratch) {
  return block_reduce<Sum>(value, 0.0f, scratch);
}

__device__ __forceinline__ float block_max(float value, float* scratch) {
  return block_reduce<Max>(value, -__int_as_float(0x7f800000), scratch);
}

}  // namespace headway::cuda
