// First kernel of a step: applies the packet to the mirror, then derives the layers' inputs. One block, so that its
// barriers order the acts; a step's bookkeeping is a few thousand words. Knows nothing of the model.
#include "cuda/common/check.h"
#include "cuda/common/clock.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/ops.h"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "begin_step";
constexpr int kThreads = 1024;

// The sections of a packet, as pointers.
struct PacketView {
  const PacketHeader* header;
  const RowInit* inits;
  const int32_t* words;
  const BlockGrant* grants;
  const StepRow* rows;
  const int32_t* prompt_tokens;
  const StateSnapshot* snapshots;
  const RowRewind* rewinds;
  const int32_t* mask_rows;
  const uint32_t* mask_bits;
  const ScoredToken* scores;
  const StateCopy* copies;
};

__device__ PacketView view_packet(const uint8_t* packet) {
  const auto* header = reinterpret_cast<const PacketHeader*>(packet);
  return {header,
          reinterpret_cast<const RowInit*>(packet + header->inits_offset),
          reinterpret_cast<const int32_t*>(packet + header->words_offset),
          reinterpret_cast<const BlockGrant*>(packet + header->grants_offset),
          reinterpret_cast<const StepRow*>(packet + header->rows_offset),
          reinterpret_cast<const int32_t*>(packet + header->tokens_offset),
          reinterpret_cast<const StateSnapshot*>(packet + header->snapshots_offset),
          reinterpret_cast<const RowRewind*>(packet + header->rewinds_offset),
          reinterpret_cast<const int32_t*>(packet + header->mask_rows_offset),
          reinterpret_cast<const uint32_t*>(packet + header->mask_bits_offset),
          reinterpret_cast<const ScoredToken*>(packet + header->scores_offset),
          reinterpret_cast<const StateCopy*>(packet + header->copies_offset)};
}

// One warp resets a row's entries and copies its lists.
__device__ void apply_init(const DeviceMirror& mirror, const RowInit& init, const int32_t* words, int lane) {
  const int row = init.row;
  const int32_t* list = words + init.words_begin;
  const int num_stop_ids = init.sampling.num_stop_ids;
  const int num_bias = init.sampling.num_logit_bias;
  if (lane == 0) {
    mirror.last_token[row] = 0;
    mirror.num_computed[row] = 0;
    mirror.stopped[row] = 0;
    mirror.slot[row] = init.slot;
    mirror.sampling[row] = init.sampling;
  }
  for (int i = lane; i < num_stop_ids; i += kWarpSize) {
    mirror.stop_ids[static_cast<int64_t>(row) * kMaxStopIds + i] = list[i];
  }
  const int64_t bias_begin = static_cast<int64_t>(row) * kMaxLogitBias;
  for (int i = lane; i < num_bias; i += kWarpSize) {
    mirror.bias_ids[bias_begin + i] = list[num_stop_ids + i];
    mirror.bias_values[bias_begin + i] = __int_as_float(list[num_stop_ids + num_bias + i]);
  }
  const int32_t* bad_words = list + num_stop_ids + 2 * num_bias;
  for (int i = lane; i < init.sampling.num_bad_words + init.sampling.num_bad_word_tokens; i += kWarpSize) {
    mirror.bad_words[static_cast<int64_t>(row) * kMaxBadWordEntries + i] = bad_words[i];
  }
}

// All threads on one mask after the other: a mask is some thousand words, and few rows bring one.
__device__ void apply_masks(const DeviceMirror& mirror, const PacketView& packet) {
  const int num_words = mirror.mask_words;
  for (int i = 0; i < packet.header->num_masks; ++i) {
    const uint32_t* bits = packet.mask_bits + static_cast<int64_t>(i) * num_words;
    uint32_t* mask = mirror.token_masks + static_cast<int64_t>(packet.mask_rows[i]) * num_words;
    for (int w = static_cast<int>(threadIdx.x); w < num_words; w += kThreads) mask[w] = bits[w];
  }
}

__device__ void fill_scores(const StepInputs& inputs, const PacketView& packet) {
  for (int i = static_cast<int>(threadIdx.x); i < packet.header->num_scored; i += kThreads) {
    inputs.score_tokens[i] = packet.scores[i].token_index;
    inputs.score_rows[i] = packet.scores[i].row;
    inputs.score_targets[i] = packet.scores[i].target;
  }
}

__device__ void apply_packet(const DeviceMirror& mirror, const PacketView& packet, int max_live) {
  const int thread = static_cast<int>(threadIdx.x);
  const PacketHeader& header = *packet.header;
  for (int i = thread / kWarpSize; i < header.num_inits; i += kThreads / kWarpSize) {
    apply_init(mirror, packet.inits[i], packet.words, thread % kWarpSize);
  }
  for (int i = thread; i < header.num_grants; i += kThreads) {
    const BlockGrant grant = packet.grants[i];
    mirror.block_table[static_cast<int64_t>(grant.row) * mirror.max_blocks_per_row + grant.index] = grant.block;
  }
  for (int i = thread; i < min(header.num_rows, max_live); i += kThreads) mirror.live[i] = packet.rows[i];
  for (int i = thread; i < header.num_copies; i += kThreads) {
    mirror.state_base[packet.copies[i].dst_slot] = packet.copies[i].position;
  }
  apply_masks(mirror, packet);
  if (header.num_rewinds == 0) return;
  __syncthreads();  // a row that is admitted and rewound at once is reset first
  for (int i = thread; i < header.num_rewinds; i += kThreads) {
    const RowRewind rewind = packet.rewinds[i];
    mirror.num_computed[rewind.row] = rewind.num_computed;
    mirror.last_token[rewind.row] = rewind.last_token;
    mirror.stopped[rewind.row] = 0;
  }
}

// What the step is made of, the same for every thread.
struct StepShape {
  int num_live;         // rows beyond are padding
  int num_decode_rows;  // the first rows
  bool has_packet;
};

// Row i of the step. A padding row, and a row that the device has stopped, is the dummy row; its tokens stay counted.
__device__ StepRow step_row(const DeviceMirror& mirror, const StepShape& shape, int i) {
  if (i >= shape.num_live) return {kDummyRow, 0, 1, -1, kDummySlot, 0};
  StepRow row = mirror.live[i];
  if (i < shape.num_decode_rows) {
    row.num_tokens = 1;
    row.prompt_begin = -1;
    row.num_history = 0;
  }
  if (mirror.stopped[row.row] != 0) row.row = kDummyRow;
  return row;
}

struct PrefixSum {
  int inclusive;  // of this thread and those before it
  int total;      // of the block
};

// All threads call it; `scratch` holds 32 ints and is free again on return.
__device__ PrefixSum block_prefix_sum(int value, int* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kFullWarp, value, offset);
    if (lane >= offset) value += other;
  }
  if (lane == kWarpSize - 1) scratch[warp] = value;
  __syncthreads();
  PrefixSum sum{value, 0};
  for (int i = 0; i < kThreads / kWarpSize; ++i) {
    sum.total += scratch[i];
    if (i < warp) sum.inclusive += scratch[i];
  }
  __syncthreads();
  return sum;
}

// Fills the per-row inputs and, for prompt chunks, the row's num_computed.
__device__ void derive_rows(const BeginStepParams& params, const StepShape& shape, int* scratch) {
  const StepInputs& inputs = params.inputs;
  const int thread = static_cast<int>(threadIdx.x);
  int tokens_before = 0;
  if (thread == 0) inputs.query_start[0] = 0;
  for (int base = 0; base < params.num_rows; base += kThreads) {
    const int i = base + thread;
    StepRow row = {kDummyRow, 0, 0, -1, kDummySlot, 0};
    if (i < params.num_rows) row = step_row(params.mirror, shape, i);
    const PrefixSum sum = block_prefix_sum(row.num_tokens, scratch);
    const int end = tokens_before + sum.inclusive;
    tokens_before += sum.total;
    if (i < params.num_rows) {
      const bool is_dummy = row.row == kDummyRow;
      const bool is_decode = row.prompt_begin < 0;
      const int start = is_dummy ? 0 : is_decode ? params.mirror.num_computed[row.row] : row.start;
      if (!is_dummy && !is_decode) params.mirror.num_computed[row.row] = start;
      inputs.rows[i] = row.row;
      inputs.query_start[i + 1] = end;
      inputs.row_start[i] = start;
      inputs.kv_lens[i] = is_dummy ? 1 : start + row.num_tokens;
      const int slot = is_dummy ? kDummySlot : params.mirror.slot[row.row];
      inputs.read_slots[i] = is_dummy || is_decode ? slot : row.read_slot;
      inputs.write_slots[i] = slot;
      inputs.state_base[i] = is_dummy ? 0 : is_decode ? params.mirror.state_base[slot] : start;
      if (i < params.num_sampled) inputs.sample_tokens[i] = end - 1;
    }
  }
}

// The row that holds token t: the last whose tokens begin at or before it, and do not end there.
__device__ int row_of_token(const int32_t* query_start, int num_rows, int t) {
  int low = 0;
  int high = num_rows - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (query_start[middle + 1] > t) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Fills the per-token inputs and the rows' history.
__device__ void derive_tokens(const BeginStepParams& params, const StepShape& shape, const int32_t* prompt_tokens) {
  const StepInputs& inputs = params.inputs;
  const DeviceMirror& mirror = params.mirror;
  for (int t = static_cast<int>(threadIdx.x); t < params.num_tokens; t += kThreads) {
    const int i = row_of_token(inputs.query_start, params.num_rows, t);
    const int row = inputs.rows[i];
    const int offset = t - inputs.query_start[i];
    int token = 0;
    int position = 0;
    if (row != kDummyRow) {
      const int prompt_begin = i < shape.num_decode_rows ? -1 : mirror.live[i].prompt_begin;
      token = prompt_begin < 0 ? mirror.last_token[row] : prompt_tokens[prompt_begin + offset];
      position = inputs.row_start[i] + offset;
      if (position < mirror.max_model_len) {
        mirror.history[static_cast<int64_t>(row) * mirror.max_model_len + position] = token;
      }
    }
    inputs.token_ids[t] = token;
    inputs.positions[t] = position;
    inputs.token_rows[t] = i;
  }
}

// The history right before a chunk whose prefix is not computed; row by row, because such rows are few.
__device__ void write_history(const BeginStepParams& params, const StepShape& shape, const int32_t* prompt_tokens) {
  const DeviceMirror& mirror = params.mirror;
  for (int i = shape.num_decode_rows; i < shape.num_live; ++i) {
    const StepRow live = mirror.live[i];
    const int row = params.inputs.rows[i];
    if (live.num_history == 0 || row == kDummyRow) continue;
    int32_t* history = mirror.history + static_cast<int64_t>(row) * mirror.max_model_len;
    for (int t = static_cast<int>(threadIdx.x) - live.num_history; t < 0; t += kThreads) {
      history[live.start + t] = prompt_tokens[live.prompt_begin + t];
    }
  }
}

// The first of the packet's snapshots that belongs to row i or one behind it.
__device__ int first_snapshot_of(const PacketView& packet, int i) {
  int low = 0;
  int high = packet.header->num_snapshots;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (packet.snapshots[middle].row_index < i) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The packet's snapshots, as lists that the rows' entries point into; those of dummy rows are left out.
__device__ void derive_snapshots(const BeginStepParams& params, const PacketView& packet, int* scratch) {
  const StepInputs& inputs = params.inputs;
  const int thread = static_cast<int>(threadIdx.x);
  int snapshots_before = 0;
  if (thread == 0) inputs.snapshot_starts[0] = 0;
  for (int base = 0; base < params.num_rows; base += kThreads) {
    const int i = base + thread;
    const bool is_live = i < params.num_rows && inputs.rows[i] != kDummyRow;
    const int from = is_live ? first_snapshot_of(packet, i) : 0;
    const int count = is_live ? first_snapshot_of(packet, i + 1) - from : 0;
    const PrefixSum sum = block_prefix_sum(count, scratch);
    const int end = snapshots_before + sum.inclusive;
    snapshots_before += sum.total;
    if (i < params.num_rows) inputs.snapshot_starts[i + 1] = end;
    for (int k = 0; k < count; ++k) {
      const StateSnapshot snapshot = packet.snapshots[from + k];
      params.mirror.state_base[snapshot.slot] = snapshot.position;
      inputs.snapshot_positions[end - count + k] = snapshot.position;
      inputs.snapshot_slots[end - count + k] = snapshot.slot;
    }
  }
}

__global__ void __launch_bounds__(kThreads) begin_step_kernel(BeginStepParams params) {
  __shared__ int scratch[kWarpSize];
  const int64_t begin_ns = device_clock_ns();
  StepCounter* counter = params.mirror.counter;

  // Is there news? All threads read the counter before one changes it.
  PacketView packet{};
  StepShape shape{params.num_rows, params.num_rows, false};
  const int64_t next_step = counter != nullptr ? counter->step + 1 : 0;
  if (params.packet != nullptr) {
    packet = view_packet(params.packet);
    shape.has_packet = !params.is_replayed || packet.header->step == next_step;
  }
  if (shape.has_packet) {
    shape.num_live = min(packet.header->num_rows, params.num_rows);
    shape.num_decode_rows = packet.header->num_decode_rows;
  } else if (counter != nullptr) {
    shape.num_live = min(counter->num_live, params.num_rows);
  }
  __syncthreads();
  if (threadIdx.x == 0 && counter != nullptr) {
    const bool has_packet = shape.has_packet;
    *counter = {has_packet ? packet.header->step : next_step, begin_ns, shape.num_live,
                has_packet ? min(packet.header->num_sampled, params.num_sampled) : shape.num_live};
  }

  // The mirror, then the rows, then the tokens.
  if (shape.has_packet) apply_packet(params.mirror, packet, params.num_rows);
  __syncthreads();
  derive_rows(params, shape, scratch);
  __syncthreads();
  derive_tokens(params, shape, packet.prompt_tokens);
  if (!shape.has_packet) return;
  write_history(params, shape, packet.prompt_tokens);
  fill_scores(params.inputs, packet);
  if (packet.header->num_snapshots > 0) derive_snapshots(params, packet, scratch);
}

}  // namespace

void begin_step(const BeginStepParams& params, Stream stream) {
  require(!params.is_replayed || params.mirror.counter != nullptr, kOp, "a replayed step needs mirror.counter");
  begin_step_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  check_launch(kOp);
}

}  // namespace headway::cuda
