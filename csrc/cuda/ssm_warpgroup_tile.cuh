// A tile's warpgroup of ssm_warpgroup.cuh: carries the state of 64 channels through the chunks of a row and makes their
// outputs, transposed, so that channels are the rows of every product. Warp w owns 16 of the channels, all of one head.
#pragma once

#include "cuda/common/accumulators.cuh"
#include "cuda/common/wgmma_wide.cuh"
#include "cuda/ssm_chunk_rows.cuh"
#include "cuda/ssm_warpgroup_x.cuh"

namespace headway::cuda::warpgroup {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using wgmma::Rows;

// kStraddles: tiles may touch two heads.
template <typename Memory, bool kStraddles>
struct TileGroup {
  static constexpr int kN = Memory::kN;
  using Buffers = Stage<kN>;
  const Work& work;
  Memory& shared;
  int first_head;  // of the block's, that the tile touches
  int last_head;
  int head;  // of the block's, that the warp works for
  int channel;  // the warp's first, among all heads' channels
  float D;
  float state[kN / 8][4];  // [64 channels, N]
  float y[8][4] = {};  // [64 channels, 64 tokens]

  __device__ __forceinline__ TileGroup(const Work& block_work, Memory& memory) : work(block_work), shared(memory) {
    const int thread = static_cast<int>(threadIdx.x);
    const int warp_channel = work.first_channel + thread / kWarpSize * kBlock;
    first_head = work.local_head(work.first_channel);
    last_head = work.local_head(work.first_channel + kTileChannels - 1);
    head = work.local_head(warp_channel);
    channel = work.flat_channel(warp_channel);
    D = work.params.D[work.first_head() + head];
  }

  // Slots -------------------------------------------------------------------------------------------------------------

  // slot: null for zeros.
  __device__ __forceinline__ void load_state(const float* slot) {
    load_accumulators(state, slot == nullptr ? nullptr : slot + state_offset());
  }

  __device__ __forceinline__ void store_state(float* slot) { store_accumulators(state, slot + state_offset()); }

  __device__ __forceinline__ int64_t state_offset() const { return static_cast<int64_t>(channel) * kN; }

  // Chunk -------------------------------------------------------------------------------------------------------------

  // Starts y = C . s, of the state rounded.
  __device__ __forceinline__ void read_state(const Buffers& stage, uint32_t (&rounded)[kN / kBlock][4]) {
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      rounded[n / 2][n % 2 * 2] = pack_pair<Bf16>(state[n][0], state[n][1]);
      rounded[n / 2][n % 2 * 2 + 1] = pack_pair<Bf16>(state[n][2], state[n][3]);
    }
    const uint64_t C = wgmma::describe_uniform(shared_address(stage.C));
    wgmma::begin_products();
#pragma unroll
    for (int step = 0; step < kN / kBlock; ++step) {
      constexpr int kPanelSteps = wgmma::kPanelColumns / kBlock;
      const uint64_t offset =
          (step / kPanelSteps * sizeof(Panel) + step % kPanelSteps * wgmma::kStepBytes<Rows::kAlongSum>) >> 4;
      wgmma::multiply<Rows::kAlongSum>(y, rounded[step], C + offset, step > 0);
    }
    wgmma::commit_products();
  }

  __device__ __forceinline__ void decay_state(const Decays& decays) {
    const float factor = decays.from_start[kTokens - 1];
#pragma unroll
    for (auto& tile : state) {
#pragma unroll
      for (float& value : tile) value *= factor;
    }
  }

  // Zeros where the warp works for another of the block's heads: each head has weights of its own.
  __device__ __forceinline__ void keep_head(uint32_t (&x)[kNumBlocks][4], int kept_head) const {
#pragma unroll
    for (auto& operand : x) {
#pragma unroll
      for (uint32_t& word : operand) word = head == kept_head ? word : 0u;
    }
  }

  // e^cs_i
  __device__ __forceinline__ void load_decays(const Decays& decays, float2 (&factors)[8]) const {
    const int thread = fresh_thread();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      factors[i] = *reinterpret_cast<const float2*>(&decays.from_start[i * 8 + thread % 4 * 2]);
    }
  }

  // y_i *= e^cs_i
  __device__ __forceinline__ void decay_outputs(const float2 (&factors)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      y[i][0] *= factors[i].x;
      y[i][1] *= factors[i].y;
      y[i][2] *= factors[i].x;
      y[i][3] *= factors[i].y;
    }
  }

  // Starts y += weights . x.
  __device__ __forceinline__ void add_tokens(const Panel& weights, const uint32_t (&x)[kNumBlocks][4]) {
    const uint64_t W = wgmma::describe_uniform(shared_address(&weights));
#pragma unroll
    for (int j = 0; j < kNumBlocks; ++j) {
      wgmma::multiply<Rows::kAlongSum>(y, x[j], W + (j * wgmma::kStepBytes<Rows::kAlongSum> >> 4), true);
    }
  }

  // Starts s += weighed x . B.
  __device__ __forceinline__ void advance_state(const Buffers& stage, const uint32_t (&weighed)[kNumBlocks][4]) {
    const uint64_t B = wgmma::describe_uniform_panels(shared_address(stage.B), sizeof(Panel));
#pragma unroll
    for (int j = 0; j < kNumBlocks; ++j) {
      wgmma::multiply_across<Bf16>(state, weighed[j], B + (j * wgmma::kStepBytes<Rows::kAcrossSum> >> 4), true);
    }
  }

  // y + D x by way of the place of x, so that a token's 64 channels leave in one run.
  __device__ __forceinline__ void store_outputs(Panel& panel, const uint32_t (&x)[kNumBlocks][4], Chunk chunk) const {
    const uint32_t first = shared_address(&panel) + cell_bytes(fresh_thread());
    __syncwarp();  // the warp's columns of x have been read
#pragma unroll
    for (int j = 0; j < kNumBlocks; ++j) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* sum = &y[2 * j + i / 2][i % 2 * 2];
        words[i] =
            pack_pair<Bf16>(fmaf(D, chunk::low_bf16(x[j][i]), sum[0]), fmaf(D, chunk::high_bf16(x[j][i]), sum[1]));
      }
      store_matrices_transposed(first + j * kBlockBytes, words);
    }
    meet_tile();
    constexpr int kRows = kGroupThreads / 8;
    const int thread = fresh_thread();
    const int row = thread / 8;
    const int piece = thread % 8 * 8;
    const int64_t stride = static_cast<int64_t>(work.params.num_heads) * work.params.head_dim;
    Bf16* out = static_cast<Bf16*>(work.params.out) + (chunk.token + row) * stride + channel -
                thread / kWarpSize * kBlock + piece;
    const Bf16* staged = &panel.values[wgmma::panel_offset(row, piece)];
#pragma unroll
    for (int i = 0; i < kTokens / kRows; ++i) {
      if (row + i * kRows < chunk.count) {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(staged + i * kRows * wgmma::kPanelColumns);
      }
      out += kRows * stride;
    }
  }

  __device__ __forceinline__ void get_weighed(unsigned turn, const Decays& decays, const uint32_t (&x)[kNumBlocks][4],
                                              uint32_t (&weighed)[kNumBlocks][4]) const {
    if constexpr (Memory::kIsWeighed) {
      load_weighed(shared.weighed[turn % 2], fresh_thread(), weighed);
    } else {
      weigh_x(decays, fresh_thread(), x, weighed);
    }
  }

  // Starts y += weights . x, of the tile's first head.
  __device__ __forceinline__ void add_first_tokens(unsigned turn, const uint32_t (&x)[kNumBlocks][4]) {
    wgmma::begin_products();
    if constexpr (kStraddles) {
      uint32_t kept[kNumBlocks][4];
#pragma unroll
      for (int j = 0; j < kNumBlocks; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[j][i] = x[j][i];
      }
      keep_head(kept, first_head);
      add_tokens(shared.weights[turn % 2][first_head], kept);
    } else {
      add_tokens(shared.weights[turn % 2][0], x);
    }
    wgmma::commit_products();
  }

  // The same of its second one, if it has one. Leaves x.
  __device__ __forceinline__ void add_last_tokens(const Buffers& stage, unsigned turn, uint32_t (&x)[kNumBlocks][4]) {
    if (first_head == last_head) {
#pragma unroll
      for (auto& operand : x) operand[0] = operand[1] = operand[2] = operand[3] = 0u;
    } else {
      keep_head(x, last_head);
    }
    wgmma::begin_products();
    add_tokens(shared.weights[turn % 2][last_head], x);
    wgmma::commit_products();
    wgmma::wait_products<0>();
    wgmma::hold(y);
    wgmma::hold(x);
    load_x(stage.x, fresh_thread(), x);
  }

  // Between products and the wait for them stands what can run beside them; the compiler moves nothing over
  // __syncwarp(), nor keeps what is loaded early where registers are few.
  __device__ __forceinline__ void run_chunk(Buffers& stage, unsigned turn, Chunk chunk) {
    constexpr bool kLoadsEarly = Memory::kIsWeighed;
    const Decays& decays = shared.decays(turn, kStraddles ? head : 0);
    uint32_t rounded[kN / kBlock][4];
    uint32_t x[kNumBlocks][4];
    uint32_t weighed[kNumBlocks][4];
    float2 factors[8];
    if constexpr (kLoadsEarly) {
      load_x(stage.x, fresh_thread(), x);
      load_decays(decays, factors);
      get_weighed(turn, decays, x, weighed);
    }
    read_state(stage, rounded);
    __syncwarp();
    decay_state(decays);
    wgmma::hold(state);
    __syncwarp();
    wgmma::wait_products<0>();
    wgmma::hold(y);
    wgmma::hold(rounded);
    if constexpr (!kLoadsEarly) {
      load_x(stage.x, fresh_thread(), x);
      load_decays(decays, factors);
    }
    decay_outputs(factors);
    add_first_tokens(turn, x);
    __syncwarp();
    if constexpr (!kLoadsEarly) get_weighed(turn, decays, x, weighed);
    wgmma::begin_products();
    advance_state(stage, weighed);
    wgmma::commit_products();
    wgmma::wait_products<1>();
    wgmma::hold(y);
    if constexpr (kStraddles) add_last_tokens(stage, turn, x);
    store_outputs(stage.x, x, chunk);
    wgmma::wait_products<0>();
    wgmma::hold(state);
    wgmma::hold(weighed);
  }

  // A chunk whose outputs another block makes.
  __device__ __forceinline__ void pass_chunk(const Buffers& stage, unsigned turn) {
    const Decays& decays = shared.decays(turn, kStraddles ? head : 0);
    uint32_t x[kNumBlocks][4];
    uint32_t weighed[kNumBlocks][4];
    if constexpr (!Memory::kIsWeighed) load_x(stage.x, fresh_thread(), x);
    get_weighed(turn, decays, x, weighed);
    decay_state(decays);
    wgmma::begin_products();
    advance_state(stage, weighed);
    wgmma::commit_products();
    wgmma::wait_products<0>();
    wgmma::hold(state);
    wgmma::hold(weighed);
  }

  // Row ---------------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void load() {
    const SsmScanParams& params = work.params;
    const float* source = static_cast<float*>(params.state) + params.read_slots[work.item.row] * params.state_stride;
    load_state(work.item.tokens.start > 0 ? source : nullptr);
  }
  __device__ __forceinline__ void store() {
    const SsmScanParams& params = work.params;
    store_state(static_cast<float*>(params.state) + params.write_slots[work.item.row] * params.state_stride);
  }

  __device__ __forceinline__ void run_chunks(chunk::SnapshotCursor snapshots, unsigned& turn) {
    const chunk::RowTokens& tokens = work.item.tokens;
    for (int i = 0; i < work.item.first_output; ++i, ++turn) {
      shared.wait_ready(turn);
      shared.wait_fetched(turn);
      pass_chunk(shared.stage(turn), turn);
      shared.arrive_free(turn);
      snapshots.take(tokens.start + min(tokens.num_done(i + 1), tokens.num_tokens));
    }
    for (int i = work.item.first_output; i < work.item.end; ++i, ++turn) {
      shared.wait_ready(turn);
      shared.wait_fetched(turn);  // long so
      run_chunk(shared.stage(turn), turn, tokens.chunk(i));
      shared.arrive_free(turn);
      float* slot = snapshots.take(tokens.start + min(tokens.num_done(i + 1), tokens.num_tokens));
      if (slot != nullptr) store_state(slot);
    }
  }
};

#endif

}  // namespace headway::cuda::warpgroup
