// What frames the layers of a step, as Python functions: begin_step, sample and finish_step. Compiled once a device.
#include "bind/step.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "bind/address.h"
#include "bind/backend.h"
#include "bind/mirror.h"

namespace headway {
namespace {

namespace py = pybind11;

StepInputs inputs_from(const py::tuple& record) {
  return {.token_ids = address_at(record, 0),
          .positions = address_at(record, 1),
          .token_rows = address_at(record, 2),
          .rows = address_at(record, 3),
          .query_start = address_at(record, 4),
          .row_start = address_at(record, 5),
          .kv_lens = address_at(record, 6),
          .read_slots = address_at(record, 7),
          .write_slots = address_at(record, 8),
          .state_base = address_at(record, 9),
          .sample_tokens = address_at(record, 10),
          .snapshot_starts = address_at(record, 11),
          .snapshot_positions = address_at(record, 12),
          .snapshot_slots = address_at(record, 13),
          .score_tokens = address_at(record, 14),
          .score_rows = address_at(record, 15),
          .score_targets = address_at(record, 16)};
}

void begin_step(Address packet, int num_rows, int num_decode_rows, int num_sampled, int num_tokens,
                const py::tuple& mirror, const py::tuple& inputs, bool is_replayed, Address stream) {
  const BeginStepParams params{.packet = packet,
                               .num_rows = num_rows,
                               .num_decode_rows = num_decode_rows,
                               .num_sampled = num_sampled,
                               .num_tokens = num_tokens,
                               .mirror = mirror_from(mirror),
                               .inputs = inputs_from(inputs),
                               .is_replayed = is_replayed};
  const py::gil_scoped_release unlocked;
  backend::begin_step(params, stream);
}

void sample(int num_sampled, int vocab_size, int max_logprobs, Address logits, int64_t logits_stride, Address rows,
            Address kv_lens, Address targets, const py::tuple& mirror, Address results, Address top_ids,
            Address top_logprobs, Address scratch, Address scan, Address stream) {
  const SampleParams params{.num_sampled = num_sampled,
                            .vocab_size = vocab_size,
                            .max_logprobs = max_logprobs,
                            .logits = logits,
                            .logits_stride = logits_stride,
                            .rows = rows,
                            .kv_lens = kv_lens,
                            .targets = targets,
                            .mirror = mirror_from(mirror),
                            .results = results,
                            .top_ids = top_ids,
                            .top_logprobs = top_logprobs,
                            .scratch = scratch,
                            .scan = scan};
  const py::gil_scoped_release unlocked;
  backend::sample(params, stream);
}

void finish_step(int64_t step, int num_rows, int num_decode_rows, int num_sampled, int num_scored, int max_logprobs,
                 const py::tuple& mirror, const py::tuple& inputs, Address results, Address top_ids,
                 Address top_logprobs, Address ring_entry, int ring_max_results, int ring_num_entries,
                 int64_t ring_entry_bytes, Address stream) {
  const FinishStepParams params{.step = step,
                                .num_rows = num_rows,
                                .num_decode_rows = num_decode_rows,
                                .num_sampled = num_sampled,
                                .num_scored = num_scored,
                                .max_logprobs = max_logprobs,
                                .mirror = mirror_from(mirror),
                                .inputs = inputs_from(inputs),
                                .results = results,
                                .top_ids = top_ids,
                                .top_logprobs = top_logprobs,
                                .ring_entry = ring_entry,
                                .ring_max_results = ring_max_results,
                                .ring_num_entries = ring_num_entries,
                                .ring_entry_bytes = ring_entry_bytes};
  const py::gil_scoped_release unlocked;
  backend::finish_step(params, stream);
}

void copy_states(int num_copies, Address copies, int num_layers, const std::vector<std::array<int64_t, 3>>& pools,
                 Address stream) {
  CopyStatesParams params{.num_copies = num_copies,
                          .copies = copies,
                          .num_layers = num_layers,
                          .num_pools = static_cast<int32_t>(pools.size()),
                          .pools = {}};
  if (pools.size() > kMaxStatePools) throw std::invalid_argument("copy_states: more pools than kMaxStatePools");
  for (size_t i = 0; i < pools.size(); ++i) {
    params.pools[i] = {Address{static_cast<uintptr_t>(pools[i][0])}, pools[i][1], pools[i][2]};
  }
  const py::gil_scoped_release unlocked;
  backend::copy_states(params, stream);
}

void move_records(int num_moves, Address moves, int num_pools, Address pools, int64_t num_pieces, int max_thread_blocks,
                  Address stream) {
  const MoveRecordsParams params{.num_moves = num_moves,
                                 .moves = moves,
                                 .num_pools = num_pools,
                                 .pools = pools,
                                 .num_pieces = num_pieces,
                                 .max_thread_blocks = max_thread_blocks};
  const py::gil_scoped_release unlocked;
  backend::move_records(params, stream);
}

}  // namespace

void bind_step(py::module_& module) {
  module.def("begin_step", &begin_step);
  module.def("sample", &sample);
  module.def("finish_step", &finish_step);
  module.def("copy_states", &copy_states);
  module.def("move_records", &move_records);
}

}  // namespace headway
