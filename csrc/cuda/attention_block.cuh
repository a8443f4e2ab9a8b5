// A block of the decode kernel: its warps' leaves of a step meet in shared memory, where all threads fold them, while
// the next step's keys are on their way.
#pragma once

#include "cuda/attention_step.cuh"

namespace headway::cuda {

template <typename T, int kDim, bool kIsPadded>
class DecodeBlock {
 public:
  using Memory = DecodeMemory<kDim>;

  __device__ DecodeBlock(const DecodeParams& params, Memory& memory, const int32_t* prefix, const StepList& list)
      : params_(params),
        memory_(memory),
        prefix_(prefix),
        list_(list),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize),
        leaf_warp_(params, lane_) {}

  __device__ void attend(int begin, int end) {
    begin_ = begin;
    end_ = end;
    for (int index = begin; index < min(begin + kStepsKnown - 1, end); ++index) {
      if (warp_ == index % kDecodeWarps) store_step(index);
    }
    __syncthreads();
    int32_t blocks[kThreadKeys];
    for (int index = begin; index < min(begin + 2, end); ++index) {
      find_blocks(index, blocks);
      store_places(index, blocks);
    }
    if (begin + 2 < end) find_blocks(begin + 2, blocks);
    copy_queries(step_at(begin));
    wait_copies<0>();
    __syncthreads();
    for (int index = begin; index < end; ++index) {
      const Step& step = step_at(index);
      add_leaf(step, index);
      publish(step);
      if (warp_ == index % kDecodeWarps && index + 3 < end) store_step(index + 3);
      __syncthreads();
      if (index + 1 < end && !step_at(index + 1).has_queries_of(step)) copy_queries(step_at(index + 1));
      if (index + 2 < end) store_places(index + 2, blocks);
      if (index + 3 < end) find_blocks(index + 3, blocks);
      if (step.num_packed > 0) fold(step, index);
      wait_copies<0>();
      __syncthreads();
    }
  }

 private:
  static constexpr int kWords = Memory::kThreadWords;
  using Sum = Folded<kWords>;

  static constexpr int kThreadKeys = kStepKeys / kDecodeThreads;

  __device__ const Step& step_at(int index) const { return memory_.steps[index % kStepsKnown]; }

  // A warp's work.
  __device__ void store_step(int index) {
    const Step step = find_step(params_, list_, prefix_, index);
    if (lane_ == 0) memory_.steps[index % kStepsKnown] = step;
  }

  // Key i of the thread's in a step; those beyond the row's last are the last.
  __device__ static int key_of(const Step& step, int i) {
    const int key = step.first_key + static_cast<int>(threadIdx.x) + i * kDecodeThreads;
    return min(key, step.row.kv_len - 1);
  }

  __device__ void find_blocks(int index, int32_t (&blocks)[kThreadKeys]) const {
    const Step& step = step_at(index);
#pragma unroll
    for (int i = 0; i < kThreadKeys; ++i) {
      blocks[i] = step.row.blocks[key_of(step, i) / params_.attention.cache.block_size];
    }
  }

  __device__ void store_places(int index, const int32_t (&blocks)[kThreadKeys]) {
    const Step& step = step_at(index);
    const KvCache& cache = params_.attention.cache;
    const auto head_pieces = static_cast<uint32_t>(params_.attention.head_dim / 8);
#pragma unroll
    for (int i = 0; i < kThreadKeys; ++i) {
      const int row = key_of(step, i) % cache.block_size * params_.attention.num_kv_heads + step.kv_head;
      memory_.places[index % 2][threadIdx.x + i * kDecodeThreads] =
          static_cast<uint32_t>(blocks[i]) * static_cast<uint32_t>(cache.block_stride / 8) +
          static_cast<uint32_t>(row) * head_pieces;
    }
  }

  // Of the warp's leaf in a step.
  __device__ int num_keys(const Step& step) const {
    return step.num_packed <= 0 ? 0 : min(kLeafKeys, step.row.kv_len - step.first_key - warp_ * kLeafKeys);
  }

  __device__ uint32_t leaf_places(int index) const {
    return shared_address(&memory_.places[index % 2][warp_ * kLeafKeys]);
  }

  // Loads come from step `index` from now on; false if the warp has nothing to load there.
  __device__ bool enter(int index) {
    if (index >= end_ || num_keys(step_at(index)) <= 0) return false;
    leaf_warp_.enter(leaf_places(index), num_keys(step_at(index)), step_at(index).first_channel);
    return true;
  }

  // In the order of LeafWarp's operands.
  __device__ void copy_queries(const Step& step) {
    constexpr int kPieces = kDim / 32 * 2 * kWarpSize;
    const auto* q = static_cast<const T*>(params_.attention.q);
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < kPieces; i += kDecodeThreads) {
      const int row = i / kWarpSize % 2 * 8 + lane_ / 4;
      const int channel = i / (2 * kWarpSize) * 32 + lane_ % 4 * 8;
      const bool is_valid = row < step.num_packed && channel < params_.attention.head_dim;
      const T* source = is_valid ? q + fragment_offset(params_, step, row, params_.attention.q_stride) + channel : q;
      copy_async(shared_address(&memory_.queries[0][0][0] + i), source, is_valid);
    }
    commit_copies();
  }

  __device__ void add_leaf(const Step& step, int index) {
    leaf_warp_.reset();
    const int count = num_keys(step);
    if (count <= 0) return;
    int limit[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int index = lane_ / 4 + 8 * half;
      const int query = (step.first_packed + index) / params_.group;
      limit[half] = index < step.num_packed ? step.row.first_position + query + 1 : 0;
    }
    const int fewest_keys = step.row.first_position + step.first_packed / params_.group + 1;
    if (!is_loading_) leaf_warp_.start(leaf_places(index), count, step.first_channel);
    const int first = step.first_key + warp_ * kLeafKeys;
    for (int key = first; key < first + count; key += kLoadKeys) {
      leaf_warp_.add(&memory_.queries[0][0][0], key, fewest_keys, limit, [&] {
        if (leaf_warp_.step()) return true;
        is_loading_ = enter(index + 1);
        return is_loading_;
      });
    }
    leaf_warp_.finish();
  }

  // The warp's leaf to shared memory.
  __device__ void publish(const Step& step) {
    publish_half<0>();
    if (step.num_packed > 8) publish_half<1>();
  }

  template <int kHalf>
  __device__ void publish_half() {
#pragma unroll
    for (int i = 0; i < Memory::kHalfWords; ++i) {
      memory_.leaves[warp_][kHalf][i][lane_] = leaf_warp_.template word<kHalf>(i);
    }
    if (lane_ % 4 == 0) {
      memory_.largest[warp_][lane_ / 4 + 8 * kHalf] = leaf_warp_.state().largest[kHalf];
      memory_.totals[warp_][lane_ / 4 + 8 * kHalf] = leaf_warp_.state().sum[kHalf];
    }
  }

  // Of the fragment's rows, the one that the thread folds.
  __device__ int folded_row() const { return lane_ / 4 + warp_ / 2 * 8; }
  // Of the thread's word i of that row, among the part's channels.
  __device__ int folded_channel(int i) const {
    const int word = warp_ % 2 * kWords + i;
    return word / 4 * 64 + lane_ % 4 * 16 + word % 4 * 4;
  }

  __device__ void fold(const Step& step, int index) {
    if (folded_row() >= step.num_packed) return;
    Sum sum;
    sum.reset();
    const int num_leaves = min(kDecodeWarps, (step.row.kv_len - step.first_key + kLeafKeys - 1) / kLeafKeys);
    for (int leaf = 0; leaf < num_leaves; ++leaf) {
      const MergeFactors factors =
          sum.begin_merge(memory_.largest[leaf][folded_row()], memory_.totals[leaf][folded_row()], params_.log2_scale);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        sum.merge_word(i, memory_.leaves[leaf][warp_ / 2][warp_ % 2 * kWords + i][lane_], factors);
      }
    }
    const int in_span = step.position % kSpanSteps;
    if (index - in_span < begin_) {  // the span's beginning is another block's
      return write_partial(step_place(list_, static_cast<int>(blockIdx.x), index), sum);
    }
    Sum span;
    span.reset();
    if (in_span != 0) restore(span, memory_.span);
    span.add(sum, params_.log2_scale);
    const bool is_last = step.position == step.all.count - 1;
    if (in_span == kSpanSteps - 1 || is_last) {
      close_span(step, span, is_last);
    } else if (index == end_ - 1) {
      write_partial(step.all.place + step.position / kSpanSteps, span);
    } else {
      save(span, memory_.span);
    }
  }

  __device__ void close_span(const Step& step, const Sum& span, bool is_last) {
    const bool is_first = step.position < kSpanSteps;
    if (list_.cuts != Cuts::kRows && !(is_first && is_last)) {
      return write_partial(step.all.place + step.position / kSpanSteps, span);
    }
    Sum row;
    row.reset();
    const auto block = static_cast<int>(blockIdx.x);
    if (!is_first) read_partial(serial_place(block, step.position - kSpanSteps), row);
    row.add(span, params_.log2_scale);
    if (is_last) {
      write_output(step, row);
    } else {
      write_partial(serial_place(block, step.position), row);
    }
  }

  __device__ static void save(const Sum& sum, float4 (&words)[kWords + 1][kDecodeThreads]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i][threadIdx.x] = sum.words[i];
    words[kWords][threadIdx.x] = make_float4(sum.largest, sum.total, 0.0f, 0.0f);
  }

  __device__ static void restore(Sum& sum, const float4 (&words)[kWords + 1][kDecodeThreads]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) sum.words[i] = words[i][threadIdx.x];
    const float4 state = words[kWords][threadIdx.x];
    sum.largest = state.x;
    sum.total = state.y;
  }

  __device__ void write_output(const Step& step, const Sum& sum) const {
    const int head_dim = params_.attention.head_dim;
    const int64_t stride = static_cast<int64_t>(params_.attention.num_heads) * head_dim;
    T* out = static_cast<T*>(params_.attention.out) + fragment_offset(params_, step, folded_row(), stride);
    const float factor = reciprocal_of(sum.total);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int channel = step.first_channel + folded_channel(i);
      if (channel >= head_dim) continue;
      const float4& word = sum.words[i];
      *reinterpret_cast<uint2*>(out + channel) =
          make_uint2(pack_pair<T>(__fmul_rn(word.x, factor), __fmul_rn(word.y, factor)),
                     pack_pair<T>(__fmul_rn(word.z, factor), __fmul_rn(word.w, factor)));
    }
  }

  __device__ void write_partial(int64_t place, const Sum& sum) const {
    const Partial partial = partial_of(params_, place);
    const int channels = part_channels(params_);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (folded_channel(i) >= channels) continue;
      *reinterpret_cast<float4*>(partial.sums + folded_row() * channels + folded_channel(i)) = sum.words[i];
    }
    if (folded_channel(0) != 0) return;
    partial.largest[folded_row()] = sum.largest;
    partial.totals[folded_row()] = sum.total;
  }

  // What this thread, and in serial mode the block's other threads that fold the row, wrote last.
  __device__ void read_partial(int64_t place, Sum& sum) const {
    const Partial partial = partial_of(params_, place);
    const int channels = part_channels(params_);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (folded_channel(i) >= channels) continue;
      sum.words[i] = *reinterpret_cast<const float4*>(partial.sums + folded_row() * channels + folded_channel(i));
    }
    sum.largest = partial.largest[folded_row()];
    sum.total = partial.totals[folded_row()];
  }

  const DecodeParams& params_;
  Memory& memory_;
  const int32_t* prefix_;
  const StepList& list_;
  int lane_;
  int warp_;
  int begin_ = 0;  // of the block's piece
  int end_ = 0;
  bool is_loading_ = false;  // the keys and values of the step to come
  LeafWarp<T, kDim, kIsPadded> leaf_warp_;
};

}  // namespace headway::cuda
