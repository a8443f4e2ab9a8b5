// Products of up to 16 tokens with a matrix (large ones: skinny_linear_warpgroup.cuh, skinny_linear_short.cuh), for
// decode steps: bound by reading the matrix, so it is read once and its reads never stop. Rows of the matrix are dealt
// out to one block a multiprocessor, as evenly as rows go; a block's warps split the columns, so that no second kernel
// need add anything up; a warp loads 32 columns of its group of rows ahead several times over, straight into the
// registers that feed the tensor cores, across groups. The matrix does not depend on the previous kernel: the first
// loads are under way while that one still runs.
//
// The order of columns within a product is free as long as both operands agree: lane l = 4 g + t loads columns 8 t ..
// 8 t + 7 of every 32, of row g of the matrix and of token g, and products take 4 of them each. A sum's order depends
// on the matrix's shape alone.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/device.h"
#include "cuda/common/dtype.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/ops.h"
#include "cuda/skinny_linear.h"

namespace headway::cuda {
namespace {

constexpr auto& kOp = kSkinnyLinearOp;
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kChunk = 32;  // columns of a warp's step
constexpr int kMaxTiles = 5;  // of 8 rows, in a group
constexpr int kMaxTokens = 16;

struct SkinnyWork {
  SkinnyLinearParams linear;
  int group_rows;  // at most 8 kTiles
};

// Steps that a warp is ahead: what fits the registers of 512 threads. halves: of 8 tokens.
constexpr int num_stages(int tiles, int halves) {
  constexpr int kFew[] = {10, 6, 5, 4, 3};
  constexpr int kMany[] = {6, 6, 4, 3, 2};
  return halves == 1 ? kFew[tiles - 1] : kMany[tiles - 1];
}
template <int kTiles, int kHalves>
inline constexpr int kStages = num_stages(kTiles, kHalves);

// What a warp loads next: a group of rows, and 32 columns. It runs through its share of the columns for each group.
struct Cursor {
  int row;    // first of the group
  int chunk;
};

template <typename T, int kTiles, int kHalves>
class SkinnyBlock {
 public:
  using Partial = float[kWarps][8 * kHalves][8 * kTiles];  // of [token, row] of a group

  __device__ SkinnyBlock(const SkinnyWork& work, Partial& partial)
      : work_(work),
        params_(work.linear),
        partial_(partial),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize) {
    const int64_t rows = params_.num_outputs;
    const int num_chunks = (params_.num_inputs + kChunk - 1) / kChunk;
    const int begin = static_cast<int>(blockIdx.x * rows / gridDim.x);
    end_row_ = static_cast<int>((blockIdx.x + 1) * rows / gridDim.x);
    begin_chunk_ = warp_ * num_chunks / kWarps;
    end_chunk_ = (warp_ + 1) * num_chunks / kWarps;
    next_ = {begin, begin_chunk_};
    done_ = next_;
  }

  __device__ void run() {
    constexpr int kAhead = kStages<kTiles, kHalves>;
    Cursor first_x = next_;
    const bool has_columns = begin_chunk_ < end_chunk_;
#pragma unroll
    for (int stage = 0; stage < kAhead; ++stage) {
      if (has_columns && next_.row < end_row_) {
        load_matrix(stage);
        advance(next_);
      }
    }
    wait_for_previous_kernel();
#pragma unroll
    for (int stage = 0; stage < kAhead; ++stage) {
      if (has_columns && first_x.row < end_row_) {
        load_tokens(stage, first_x.chunk);
        advance(first_x);
      }
    }
    reset();
    if (!has_columns) {
      for (; done_.row < end_row_; done_.row += work_.group_rows) finish_group();
      return;
    }
    while (done_.row < end_row_) {
#pragma unroll
      for (int stage = 0; stage < kAhead; ++stage) {
        if (done_.row >= end_row_) break;
        multiply(stage);
        if (next_.row < end_row_) {
          load_matrix(stage);
          load_tokens(stage, next_.chunk);
          advance(next_);
        }
        if (done_.chunk + 1 == end_chunk_) finish_group();
        advance(done_);
      }
    }
  }

 private:
  __device__ void advance(Cursor& cursor) const {
    if (++cursor.chunk < end_chunk_) return;
    cursor.chunk = begin_chunk_;
    cursor.row += work_.group_rows;
  }

  __device__ void reset() {
#pragma unroll
    for (auto& sum : sums_) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
  }

  // Rows beyond the group's and columns beyond the last are zeros.
  __device__ void load_matrix(int stage) {
    const int column = next_.chunk * kChunk + lane_ % 4 * 8;
    const int num_rows = min(work_.group_rows, end_row_ - next_.row);
    const T* source = static_cast<const T*>(params_.weight) +
                      static_cast<int64_t>(next_.row + lane_ / 4) * params_.num_inputs + column;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const bool is_valid = 8 * tile + lane_ / 4 < num_rows && column < params_.num_inputs;
      matrix_[stage][tile] = make_uint4(0, 0, 0, 0);
      if (is_valid) matrix_[stage][tile] = load_once<256>(source);
      source += int64_t{8} * params_.num_inputs;
    }
  }

  __device__ void load_tokens(int stage, int chunk) {
    const int column = chunk * kChunk + lane_ % 4 * 8;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int token = lane_ / 4 + 8 * half;
      tokens_[stage][half] = make_uint4(0, 0, 0, 0);
      if (token < params_.num_tokens && column < params_.num_inputs) {
        const T* source = static_cast<const T*>(params_.x) + token * params_.x_stride + column;
        tokens_[stage][half] = *reinterpret_cast<const uint4*>(source);
      }
    }
  }

  __device__ void multiply(int stage) {
    const uint4 upper = tokens_[stage][0];
    const uint4 lower = kHalves == 1 ? make_uint4(0, 0, 0, 0) : tokens_[stage][kHalves - 1];
    const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
    const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_add<T>(sums_[tile], first, matrix_[stage][tile].x, matrix_[stage][tile].y);
      multiply_add<T>(sums_[tile], second, matrix_[stage][tile].z, matrix_[stage][tile].w);
    }
  }

  // The warps' sums of the group at done_ meet, in the warps' order.
  __device__ void finish_group() {
    __syncthreads();  // the last group's have been read
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        float* target = &partial_[warp_][lane_ / 4 + 8 * half][8 * tile + lane_ % 4 * 2];
        *reinterpret_cast<float2*>(target) = make_float2(sums_[tile][2 * half], sums_[tile][2 * half + 1]);
      }
    }
    reset();
    __syncthreads();
    const int num_rows = min(work_.group_rows, end_row_ - done_.row);
    for (int i = static_cast<int>(threadIdx.x); i < num_rows * params_.num_tokens; i += kThreads) {
      write(i / num_rows, i % num_rows);
    }
  }

  __device__ void write(int token, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += partial_[warp][token][row];
    const int output = done_.row + row;
    if (params_.bias != nullptr) sum += to_float(static_cast<const T*>(params_.bias)[output]);
    T* out = static_cast<T*>(params_.out) + token * params_.out_stride + output;
    if (params_.is_added) sum += to_float(*out);
    *out = from_float<T>(sum);
  }

  const SkinnyWork& work_;
  const SkinnyLinearParams& params_;
  Partial& partial_;
  int lane_;
  int warp_;
  int end_row_;  // of the block
  int begin_chunk_;  // of the warp
  int end_chunk_;
  Cursor next_;  // to load
  Cursor done_;  // to multiply
  uint4 matrix_[kStages<kTiles, kHalves>][kTiles];
  uint4 tokens_[kStages<kTiles, kHalves>][kHalves];
  float sums_[kTiles][4];
};

template <typename T, int kTiles, int kHalves>
__global__ void __launch_bounds__(kThreads, 1) skinny_kernel(const __grid_constant__ SkinnyWork work) {
  using Block = SkinnyBlock<T, kTiles, kHalves>;
  __shared__ __align__(16) typename Block::Partial partial;
  allow_next_kernel();
  Block(work, partial).run();
}

template <typename T, int kTiles>
void launch(const SkinnyWork& work, int num_blocks, cudaStream_t stream) {
  auto* kernel = work.linear.num_tokens <= 8 ? skinny_kernel<T, kTiles, 1> : skinny_kernel<T, kTiles, 2>;
  launch_chained(kOp, kernel, dim3(static_cast<unsigned>(num_blocks)), kThreads, stream, work);
}

template <typename T>
void launch_dtype(const SkinnyLinearParams& params, cudaStream_t stream) {
  const int num_multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  const int num_blocks = std::min(num_multiprocessors, (params.num_outputs + 7) / 8);
  const int block_rows = (params.num_outputs + num_blocks - 1) / num_blocks;
  const int num_groups = (block_rows + 8 * kMaxTiles - 1) / (8 * kMaxTiles);
  const SkinnyWork work{params, (block_rows + num_groups - 1) / num_groups};
  switch ((work.group_rows + 7) / 8) {
    case 1:
      return launch<T, 1>(work, num_blocks, stream);
    case 2:
      return launch<T, 2>(work, num_blocks, stream);
    case 3:
      return launch<T, 3>(work, num_blocks, stream);
    case 4:
      return launch<T, 4>(work, num_blocks, stream);
    default:
      return launch<T, 5>(work, num_blocks, stream);
  }
}

// launch(params) for every most_tokens tokens.
template <typename T, typename Launch>
void for_each_slice(const SkinnyLinearParams& params, int most_tokens, Launch&& launch) {
  SkinnyLinearParams slice = params;
  for (int first = 0; first < params.num_tokens; first += most_tokens) {
    slice.num_tokens = std::min(most_tokens, params.num_tokens - first);
    slice.x = static_cast<const T*>(params.x) + first * params.x_stride;
    slice.out = static_cast<T*>(params.out) + first * params.out_stride;
    launch(slice);
  }
}

template <typename T>
void launch_slices(const SkinnyLinearParams& params, cudaStream_t stream) {
  require(is_vectorisable<T>(params.x, params.x_stride, params.num_inputs) &&
              is_vectorisable<T>(params.weight, params.num_inputs, params.num_inputs),
          kOp, "num_inputs and x's stride must be multiples of 8, x and the matrix 16-byte aligned");
  if (can_multiply_warpgroups(params)) {
    for_each_slice<T>(params, kMaxWarpgroupTokens, [&](const auto& slice) { launch_warpgroup_linear(slice, stream); });
  } else if (can_multiply_short(params)) {
    for_each_slice<T>(params, kMaxShortTokens, [&](const auto& slice) { launch_short_linear(slice, stream); });
  } else {
    for_each_slice<T>(params, kMaxTokens, [&](const auto& slice) { launch_dtype<T>(slice, stream); });
  }
}

}  // namespace

void skinny_linear(const SkinnyLinearParams& params, Stream stream) {
  if (params.num_tokens == 0 || params.num_outputs == 0) return;
  dispatch_half(params.dtype, kOp, [&](auto dtype) {
    launch_slices<typename decltype(dtype)::Type>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace headway::cuda
