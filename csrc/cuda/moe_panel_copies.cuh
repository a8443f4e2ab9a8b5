// The copying warps of moe_warpgroup.cuh.
#pragma once

#include "cuda/common/chained.cuh"
#include "cuda/moe_panels.cuh"

namespace headway::cuda::moe {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename T, bool kIsSecond>
class PanelCopies : PanelRing {
 public:
  __device__ explicit PanelCopies(const PanelRing& ring)
      : PanelRing(ring), thread_(static_cast<int>(threadIdx.x) - kProductThreads) {}

  __device__ void run() {
    const int num_early = copy_early();
    wait_for_previous_kernel();
    allow_next_kernel();  // not before: the second product takes it that the routing is there when it starts
    RingSlot slot;
    int turn = 0;
    for_items([&](const PanelItem& item) {
      find_tokens(item.chunk);
      for (int panel = 0; panel < num_panels_; ++panel, ++turn, slot.advance(work_.num_stages)) {
        free(slot).wait(slot.parity ^ 1);
        if (thread_ == 0 && turn >= num_early) copy_weights(slot, item, panel);
        copy_tokens(slot, item.chunk.count, panel);
        full(slot).arrive_after_copies();
      }
      return true;
    });
  }

 private:
  static constexpr int kRowPieces = wgmma::kPanelRowBytes / 16;
  static constexpr int kStepRows = kCopyThreads / kRowPieces;
  static constexpr int kSteps = kMostChunkPairs / kStepRows;

  // Weights of the ring's first turns, before the tokens are there. Returns how many turns.
  __device__ __forceinline__ int copy_early() const {
    int num_early = 0;
    for_items([&](const PanelItem& item) {
      const int num_turns = min(num_panels_, work_.num_stages - num_early);
      for (int panel = 0; panel < num_turns; ++panel, ++num_early) {
        if (thread_ == 0) copy_weights({num_early, 0}, item, panel);
      }
      return num_early < work_.num_stages;
    });
    return num_early;
  }

  __device__ __forceinline__ void copy_weights(RingSlot slot, const PanelItem& item, int panel) const {
    full(slot).arrive_expecting(item.num_parts * kBoxBytes);
    const int column = panel * wgmma::kPanelColumns;
    for (int part = 0; part < item.num_parts; ++part) {
      const BoxPlace place = box_place(item.chunk.expert, item.first_output + part * work_.part_outputs, column);
      const uint32_t target = weight_panel(slot) + part * kBoxBytes;
      if (item.is_read_once) {
        copy_box_once(target, work_.weight, place.indices, full(slot));
      } else {
        copy_box(target, work_.weight, place.indices, full(slot));
      }
    }
  }

  struct BoxPlace {
    int indices[4];
  };
  __device__ __forceinline__ BoxPlace box_place(int expert, int output, int column) const {
    if (work_.experts.is_gated && !kIsSecond) return {{column, 0, 0, (2 * expert * work_.outputs + output) / 8}};
    return {{column, expert * work_.outputs + output, 0, 0}};
  }

  __device__ __forceinline__ void find_tokens(const ExpertPairs& chunk) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int place = step * kStepRows + thread_ / kRowPieces;
      const int pair = table_.pairs[chunk.first + min(place, chunk.count - 1)];
      tokens_[step] =
          kIsSecond ? static_cast<const T*>(work_.experts.inner) + int64_t{pair} * work_.columns
                    : static_cast<const T*>(work_.experts.x) + pair / work_.experts.top_k * work_.experts.x_stride;
    }
  }

  // Beyond the columns zeros, as the copy engine writes them of the weights; products of places without a pair are
  // never looked at.
  __device__ __forceinline__ void copy_tokens(RingSlot slot, int count, int panel) const {
    const int piece = thread_ % kRowPieces;
    const int column = panel * wgmma::kPanelColumns + piece * 8;
    const bool is_valid = column < work_.columns;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int place = step * kStepRows + thread_ / kRowPieces;
      if (place >= count) continue;
      const uint32_t target = token_panel(slot) + place * wgmma::kPanelRowBytes + ((piece ^ (place & 7)) << 4);
      copy_async(target, tokens_[step] + (is_valid ? column : 0), is_valid);
    }
  }

  int thread_;
  const T* tokens_[kSteps];
};

#endif

}  // namespace headway::cuda::moe
