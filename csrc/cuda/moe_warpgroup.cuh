// The kernel of moe_warpgroup.cu: one of the experts' two products for batches where experts have several tokens. A
// block a multiprocessor; four warps fill a ring of panels of 64 columns: one thread has the copy engine bring the
// weights, all of them gather the rows of the tokens. Two warpgroups multiply, each 64 rows of the panel by all tokens
// of a chunk, so that weights are read once for up to 64 tokens of an expert.
//
// A sum runs over the columns in order, in one accumulator: its bits depend on the row and the token alone.
#pragma once

#include "cuda/common/chained.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/moe_activate.cuh"
#include "cuda/moe_panel_copies.cuh"
#include "cuda/moe_panels.cuh"

namespace headway::cuda::moe {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A multiplying warpgroup.
template <typename T, bool kIsSecond>
class PanelProducts : PanelRing {
 public:
  __device__ explicit PanelProducts(const PanelRing& ring)
      : PanelRing(ring), group_(static_cast<int>(threadIdx.x) / kGroupThreads) {}

  __device__ void run() {
    wait_for_previous_kernel();
    for_items([&](const PanelItem& item) {
      multiply(item);
      return true;
    });
  }

 private:
  __device__ __forceinline__ void multiply(const PanelItem& item) {
    if (group_ >= item.num_parts) {
      pass_over();
    } else if (item.chunk.count <= 8) {
      multiply_item<1>(item);
    } else if (item.chunk.count <= 16) {
      multiply_item<2>(item);
    } else if (item.chunk.count <= 32) {
      multiply_item<4>(item);
    } else {
      multiply_item<8>(item);
    }
  }

  __device__ __forceinline__ void pass_over() {
    for (int panel = 0; panel < num_panels_; ++panel, slot_.advance(work_.num_stages)) {
      full(slot_).wait(slot_.parity);
      release(slot_);
    }
  }

  // A panel's slot is free once the next panel's products are under way and its own are over.
  template <int kTokenTiles>
  __device__ __forceinline__ void multiply_item(const PanelItem& item) {
    float sums[kTokenTiles][4];
    RingSlot last;
    for (int panel = 0; panel < num_panels_; ++panel) {
      full(slot_).wait(slot_.parity);
      wgmma::publish_operands();  // tokens came by copies that the products would not wait for
      multiply_panel(sums, panel > 0);
      if (panel > 0) {
        wgmma::wait_products<1>();
        release(last);
      }
      last = slot_;
      slot_.advance(work_.num_stages);
    }
    wgmma::wait_products<0>();
    wgmma::hold(sums);
    release(last);
    write(item, sums);
  }

  template <int kTokenTiles>
  __device__ __forceinline__ void multiply_panel(float (&sums)[kTokenTiles][4], bool accumulates) const {
    constexpr int kStep = wgmma::kStepBytes<wgmma::Rows::kAlongSum>;
    const uint64_t weight = wgmma::describe(weight_panel(slot_) + group_ * kBoxBytes);
    const uint64_t tokens = wgmma::describe(token_panel(slot_));
    wgmma::begin_products();
#pragma unroll
    for (int k = 0; k < wgmma::kPanelRowBytes / kStep; ++k) {
      wgmma::multiply_shared_narrow<T>(sums, weight + (k * kStep >> 4), tokens + (k * kStep >> 4),
                                       accumulates || k > 0);
    }
    wgmma::commit_products();
  }

  __device__ __forceinline__ void release(RingSlot slot) const {
    if (threadIdx.x % kWarpSize == 0) free(slot).arrive();
  }

  template <int kTokenTiles>
  __device__ __forceinline__ void write(const PanelItem& item, const float (&sums)[kTokenTiles][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize % 4;
    const bool has_gates = work_.experts.is_gated && !kIsSecond;
    const int row = warp * (has_gates ? 8 : 16) + lane / 4;
    const int output = group_ * work_.part_outputs + row;
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int place = 8 * tile + lane % 4 * 2 + i;
        if (place >= item.chunk.count) continue;
        const int64_t first = int64_t{table_.pairs[item.chunk.first + place]} * work_.outputs + item.first_output;
        if (has_gates) {
          const float value = activate(work_.experts.activation, sums[tile][i]) * sums[tile][2 + i];
          if (output < item.num_outputs) write_inner(first + output, value);
          continue;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float sum = sums[tile][2 * half + i];
          if (output + 8 * half >= item.num_outputs) continue;
          if (kIsSecond) {
            static_cast<float*>(work_.experts.results)[first + output + 8 * half] = sum;
          } else {
            write_inner(first + output + 8 * half, activate(work_.experts.activation, sum));
          }
        }
      }
    }
  }

  __device__ __forceinline__ void write_inner(int64_t place, float value) const {
    static_cast<T*>(work_.experts.inner)[place] = from_float<T>(value);
  }

  int group_;
  RingSlot slot_;
};

#endif

template <typename T, bool kIsSecond>
__global__ void __launch_bounds__(kPanelThreads, 1) panel_kernel(const __grid_constant__ PanelWork work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char stages[];
  __shared__ Barriers barriers;
  const int num_pairs = static_cast<int>(work.experts.num_tokens) * work.experts.top_k;
  const PairTable table(stages + work.num_stages * work.stage_bytes, work.experts.num_experts, num_pairs);
  const PanelRing ring(work, table, barriers, stages);
  if (threadIdx.x == 0) {
    ring.init();
    prefetch_tensor_map(work.weight);
  }
  if (!kIsSecond) wait_for_previous_kernel();
  build_pairs(table, work.experts.expert_ids, num_pairs, work.experts.num_experts);
  if (threadIdx.x < kProductThreads) {
    PanelProducts<T, kIsSecond>(ring).run();
  } else {
    PanelCopies<T, kIsSecond>(ring).run();
  }
#endif
}

}  // namespace headway::cuda::moe
