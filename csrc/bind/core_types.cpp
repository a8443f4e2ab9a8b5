#include "bind/core_types.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "core/types.h"

namespace py = pybind11;

namespace headway {
namespace {

// A view that keeps the commit alive; the commit's memory is its own.
template <typename T>
auto column(std::vector<T> CommitRecord::* member) {
  return [member](py::object self) {
    const auto& values = self.cast<CommitRecord&>().*member;
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data(), self);
  };
}

template <typename T>
auto table(std::vector<T> CommitRecord::* member, T unused) {
  return [member, unused](py::object self) {
    const auto& record = self.cast<CommitRecord&>();
    const std::vector<py::ssize_t> shape = {static_cast<py::ssize_t>(record.tokens.size()), record.num_columns};
    const auto& values = record.*member;
    if (!values.empty()) return py::array_t<T>(shape, values.data(), self);
    py::array_t<T> filled(shape);
    std::fill_n(filled.mutable_data(), filled.size(), unused);
    return filled;
  };
}

template <typename T>
auto score_table(std::vector<T> CommitRecord::* member) {
  return [member](py::object self) {
    const auto& record = self.cast<CommitRecord&>();
    const std::vector<py::ssize_t> shape = {static_cast<py::ssize_t>(record.score_tokens.size()), record.num_columns};
    return py::array_t<T>(shape, (record.*member).data(), self);
  };
}

using MaskArray = py::array_t<uint32_t, py::array::c_style>;

SamplingSpec make_spec(uint64_t seed, float temperature, float top_p, float min_p, int32_t top_k,
                       float repetition_penalty, float presence_penalty, float frequency_penalty, int32_t min_tokens,
                       int32_t num_logprobs, int32_t num_prompt_logprobs, bool has_processed_logprobs, bool is_guided,
                       std::vector<int32_t> stop_ids, const py::dict& logit_bias,
                       std::vector<std::vector<int32_t>> bad_words, const MaskArray& token_mask) {
  SamplingSpec spec{.seed = seed,
                    .temperature = temperature,
                    .top_p = top_p,
                    .min_p = min_p,
                    .top_k = top_k,
                    .repetition_penalty = repetition_penalty,
                    .presence_penalty = presence_penalty,
                    .frequency_penalty = frequency_penalty,
                    .min_tokens = min_tokens,
                    .num_logprobs = num_logprobs,
                    .num_prompt_logprobs = num_prompt_logprobs,
                    .has_processed_logprobs = has_processed_logprobs,
                    .is_guided = is_guided,
                    .stop_ids = std::move(stop_ids),
                    .logit_bias = {},
                    .bad_words = std::move(bad_words),
                    .token_mask = {token_mask.data(), token_mask.data() + token_mask.size()}};
  for (const auto& [token, bias] : logit_bias) spec.logit_bias.emplace_back(token.cast<int32_t>(), bias.cast<float>());
  return spec;
}

LedgerConfig make_config(int32_t max_rows, int32_t num_blocks, int32_t block_size, int32_t num_slots,
                         int32_t max_model_len, int32_t max_step_tokens, int32_t vocab_size, int32_t max_logprobs,
                         int32_t max_launch_depth, int32_t grant_ahead_blocks, int32_t prompt_grid_tokens,
                         int32_t min_last_chunk_tokens, int32_t max_scored_tokens, bool use_prefix_cache,
                         int32_t max_snapshots, int32_t max_waypoints, int32_t snapshot_stride_tokens,
                         int32_t decode_snapshot_stride_tokens, bool weighs_snapshot_cost, bool caches_outputs,
                         int32_t state_window, int32_t max_rewind, int32_t num_host_blocks, int32_t num_host_slots) {
  const LedgerConfig config{.max_rows = max_rows,
                            .num_blocks = num_blocks,
                            .block_size = block_size,
                            .num_slots = num_slots,
                            .max_model_len = max_model_len,
                            .max_step_tokens = max_step_tokens,
                            .vocab_size = vocab_size,
                            .max_logprobs = max_logprobs,
                            .max_launch_depth = max_launch_depth,
                            .grant_ahead_blocks = grant_ahead_blocks,
                            .prompt_grid_tokens = prompt_grid_tokens,
                            .min_last_chunk_tokens = min_last_chunk_tokens,
                            .max_scored_tokens = max_scored_tokens,
                            .use_prefix_cache = use_prefix_cache,
                            .max_snapshots = max_snapshots,
                            .max_waypoints = max_waypoints,
                            .snapshot_stride_tokens = snapshot_stride_tokens,
                            .decode_snapshot_stride_tokens = decode_snapshot_stride_tokens,
                            .weighs_snapshot_cost = weighs_snapshot_cost,
                            .caches_outputs = caches_outputs,
                            .num_host_blocks = num_host_blocks,
                            .num_host_slots = num_host_slots,
                            .state_window = {.num_tokens = state_window, .max_rewind = max_rewind}};
  config.validate();
  return config;
}

void bind_constants(py::module_& module) {
  module.attr("MAX_STOP_IDS") = kMaxStopIds;
  module.attr("MAX_LOGIT_BIAS") = kMaxLogitBias;
  module.attr("MAX_BAD_WORD_ENTRIES") = kMaxBadWordEntries;
  module.attr("PACKET_HEADER_BYTES") = sizeof(PacketHeader);
  module.attr("RESULT_HEADER_BYTES") = sizeof(ResultHeader);
  module.attr("ROW_SAMPLING_BYTES") = sizeof(RowSampling);
  module.attr("RESULT_ROW_BYTES") = sizeof(ResultRow);
  module.attr("STEP_ROW_BYTES") = sizeof(StepRow);
  module.attr("STATE_SNAPSHOT_BYTES") = sizeof(StateSnapshot);
  module.attr("STATE_COPY_BYTES") = sizeof(StateCopy);
  module.attr("ROW_REWIND_BYTES") = sizeof(RowRewind);
  module.attr("NOT_FINISHED") = static_cast<int>(FinishReason::kNotFinished);
  module.attr("FINISH_STOP") = static_cast<int>(FinishReason::kStop);
  module.attr("FINISH_LENGTH") = static_cast<int>(FinishReason::kLength);
  module.attr("FINISH_ABORT") = static_cast<int>(FinishReason::kAbort);
  module.attr("FINISH_ERROR") = static_cast<int>(FinishReason::kError);
}

void bind_config(py::module_& module) {
  using namespace pybind11::literals;
  py::class_<LedgerConfig>(module, "LedgerConfig",
                           "Sizes of everything the ledger accounts for. Counts exclude the dummies at index 0.")
      .def(py::init(&make_config), py::kw_only(), "max_rows"_a, "num_blocks"_a, "block_size"_a, "num_slots"_a,
           "max_model_len"_a, "max_step_tokens"_a, "vocab_size"_a, "max_logprobs"_a, "max_launch_depth"_a = 0,
           "grant_ahead_blocks"_a = 1, "prompt_grid_tokens"_a = 1, "min_last_chunk_tokens"_a = 1,
           "max_scored_tokens"_a = 0, "use_prefix_cache"_a = false, "max_snapshots"_a = 0, "max_waypoints"_a = 0,
           "snapshot_stride_tokens"_a = 0, "decode_snapshot_stride_tokens"_a = 0, "weighs_snapshot_cost"_a = false,
           "caches_outputs"_a = true, "state_window"_a = 0, "max_rewind"_a = 0, "num_host_blocks"_a = 0,
           "num_host_slots"_a = 0, "Raises RequestError naming the first size that is out of range.")
      .def_readonly("max_rows", &LedgerConfig::max_rows, "Requests that hold a row at once.")
      .def_readonly("num_blocks", &LedgerConfig::num_blocks, "KV blocks; 0 for a model without attention.")
      .def_readonly("block_size", &LedgerConfig::block_size, "Tokens a block.")
      .def_readonly("num_slots", &LedgerConfig::num_slots, "State slots; 0 for a model without Mamba layers.")
      .def_readonly("max_model_len", &LedgerConfig::max_model_len, "Tokens of one sequence.")
      .def_readonly("max_step_tokens", &LedgerConfig::max_step_tokens, "Tokens of one step.")
      .def_readonly("vocab_size", &LedgerConfig::vocab_size)
      .def_readonly("max_logprobs", &LedgerConfig::max_logprobs, "Columns of the top alternatives.")
      .def_readonly("max_launch_depth", &LedgerConfig::max_launch_depth, "Steps in flight beyond the awaited one.")
      .def_readonly("grant_ahead_blocks", &LedgerConfig::grant_ahead_blocks, "Blocks granted before the boundary.")
      .def_readonly("prompt_grid_tokens", &LedgerConfig::prompt_grid_tokens, "Where prompts are cut into steps.")
      .def_readonly("min_last_chunk_tokens", &LedgerConfig::min_last_chunk_tokens, "Of a prompt that is cut.")
      .def_readonly("use_prefix_cache", &LedgerConfig::use_prefix_cache)
      .def_readonly("max_snapshots", &LedgerConfig::max_snapshots, "Of the slots, those that cached states may hold.")
      .def_readonly("max_waypoints", &LedgerConfig::max_waypoints,
                    "Of the snapshots, those on the way of prompts and outputs.")
      .def_readonly("snapshot_stride_tokens", &LedgerConfig::snapshot_stride_tokens,
                    "Between a prompt's waypoints, which lie closer near its ends; 0: none.")
      .def_readonly("decode_snapshot_stride_tokens", &LedgerConfig::decode_snapshot_stride_tokens,
                    "Between an output's waypoints; 0: none.")
      .def_readonly("weighs_snapshot_cost", &LedgerConfig::weighs_snapshot_cost,
                    "Of the oldest snapshots the one that spares the fewest tokens is evicted.")
      .def_readonly("caches_outputs", &LedgerConfig::caches_outputs, "What a request leaves includes its outputs.")
      .def_readonly("num_host_blocks", &LedgerConfig::num_host_blocks, "KV blocks of the cache in host memory.")
      .def_readonly("num_host_slots", &LedgerConfig::num_host_slots, "States of the cache in host memory.")
      .def_property_readonly("prefix_unit_tokens", &LedgerConfig::prefix_unit_tokens,
                             "Prefixes are cached at multiples of it; no shorter one is.")
      .def_property_readonly("max_packet_snapshots", &LedgerConfig::max_packet_snapshots,
                             "States that one step's prompt chunks may leave.")
      .def_property_readonly("max_packet_copies", &LedgerConfig::max_packet_copies, "States that one step may copy.")
      .def_readonly("max_scored_tokens", &LedgerConfig::max_scored_tokens, "Prompt tokens of a step with logprobs.")
      .def_property_readonly("max_results", &LedgerConfig::max_results, "That a step reports.")
      .def_property_readonly("mask_words", &LedgerConfig::mask_words, "Of 32 bits, of a token mask.")
      .def_property_readonly(
          "state_window", [](const LedgerConfig& config) { return config.state_window.num_tokens; },
          "Tokens between rewrites of a Mamba state; 0: states are kept in place.")
      .def_property_readonly(
          "max_rewind", [](const LedgerConfig& config) { return config.state_window.max_rewind; },
          "Positions that a row may go back, with a window.")
      .def_property_readonly("max_blocks_per_row", &LedgerConfig::max_blocks_per_row,
                             "Columns of the block table; at least 1.")
      .def_property_readonly("packet_ring_bytes", &LedgerConfig::packet_ring_bytes)
      .def_property_readonly("result_ring_bytes", &LedgerConfig::result_ring_bytes)
      .def_property_readonly("result_entry_bytes", &LedgerConfig::result_entry_bytes,
                             "One entry of the result ring, laid out for max_rows rows.");
}

void bind_sampling(py::module_& module) {
  using namespace pybind11::literals;
  py::class_<SamplingSpec>(module, "SamplingSpec", "How one request samples; a neutral value switches a feature off.")
      .def(py::init(&make_spec), py::kw_only(), "seed"_a = 0, "temperature"_a = 0.0f, "top_p"_a = 1.0f,
           "min_p"_a = 0.0f, "top_k"_a = 0, "repetition_penalty"_a = 1.0f, "presence_penalty"_a = 0.0f,
           "frequency_penalty"_a = 0.0f, "min_tokens"_a = 0, "num_logprobs"_a = -1, "num_prompt_logprobs"_a = -1,
           "has_processed_logprobs"_a = false, "is_guided"_a = false, "stop_ids"_a = std::vector<int32_t>(),
           "logit_bias"_a = py::dict(), "bad_words"_a = std::vector<std::vector<int32_t>>(),
           "token_mask"_a = MaskArray(),
           "Values are checked by Ledger.add. num_logprobs: top alternatives to report, -1 for no logprob at all.");
}

void bind_plan(py::module_& module) {
  py::class_<Plan>(module, "Plan", "One step to launch. The packet lives until the step is committed.")
      .def_readonly("step", &Plan::step)
      .def_readonly("num_rows", &Plan::num_rows, "R")
      .def_readonly("num_decode_rows", &Plan::num_decode_rows)
      .def_readonly("num_sampled", &Plan::num_sampled, "Rs: the step's first rows sample.")
      .def_readonly("num_tokens", &Plan::num_tokens, "T")
      .def_readonly("max_query_len", &Plan::max_query_len, "Tokens of the longest row of this step.")
      .def_readonly("max_kv_len", &Plan::max_kv_len, "Upper bound of the rows' KV length after this step.")
      .def_readonly("num_snapshots", &Plan::num_snapshots, "States that prompt chunks leave beside the rows' own.")
      .def_readonly("num_copies", &Plan::num_copies, "States to copy before the layers run.")
      .def_readonly("num_scored", &Plan::num_scored, "Prompt tokens whose logprobs are reported.")
      .def_readonly("num_admitted", &Plan::num_admitted, "Requests that got a row in this step.")
      .def_property_readonly(
          "packet_address", [](const Plan& plan) { return reinterpret_cast<uintptr_t>(plan.packet); },
          "0: nothing new, no copy.")
      .def_readonly("packet_bytes", &Plan::packet_bytes)
      .def_readonly("copies_offset", &Plan::copies_offset, "Where the packet has the copies.")
      .def_property_readonly(
          "result_address", [](const Plan& plan) { return reinterpret_cast<uintptr_t>(plan.result); },
          "The ring entry the step publishes to, laid out for config.max_rows rows.");
}

void bind_commit(py::module_& module) {
  py::class_<CommitRecord>(module, "Commit",
                           "What one retired step changed. Arrays share index i; void results are left out.")
      .def_readonly("step", &CommitRecord::step)
      .def_readonly("begin_ns", &CommitRecord::begin_ns, "Device clock, 0 where the device has none.")
      .def_readonly("end_ns", &CommitRecord::end_ns)
      .def_property_readonly("request_ids", column(&CommitRecord::request_ids), "[n] int64")
      .def_property_readonly("tokens", column(&CommitRecord::tokens), "[n] int32, -1 for FINISH_ERROR")
      .def_property_readonly("finish_reasons", column(&CommitRecord::finish_reasons), "[n] int32")
      .def_property_readonly("stop_tokens", column(&CommitRecord::stop_tokens), "[n] int32, -1 if none")
      .def_property_readonly("cached_tokens", column(&CommitRecord::cached_tokens),
                             "[n] int32, of the request's prompt, those found in the prefix cache")
      .def_property_readonly("logprobs", column(&CommitRecord::logprobs), "[n] float32")
      .def_property_readonly("ranks", column(&CommitRecord::ranks), "[n] int32, 1 = most likely")
      .def_property_readonly("top_ids", table(&CommitRecord::top_ids, -1), "[n, max_logprobs] int32, -1 unused")
      .def_property_readonly("top_logprobs", table(&CommitRecord::top_logprobs, 0.0f), "[n, max_logprobs] float32")
      .def_property_readonly("score_request_ids", column(&CommitRecord::score_request_ids), "[m] int64")
      .def_property_readonly("score_tokens", column(&CommitRecord::score_tokens), "[m] int32, of the prompt")
      .def_property_readonly("score_logprobs", column(&CommitRecord::score_logprobs), "[m] float32")
      .def_property_readonly("score_ranks", column(&CommitRecord::score_ranks), "[m] int32")
      .def_property_readonly("score_top_ids", score_table(&CommitRecord::score_top_ids), "[m, max_logprobs] int32")
      .def_property_readonly("score_top_logprobs", score_table(&CommitRecord::score_top_logprobs),
                             "[m, max_logprobs] float32");
}

void bind_stats(py::module_& module) {
  py::class_<Stats>(module, "Stats", "Counters of the ledger at one moment. free + live + fenced = total.")
      .def_readonly("num_waiting", &Stats::num_waiting)
      .def_readonly("num_running", &Stats::num_running)
      .def_readonly("num_paused", &Stats::num_paused)
      .def_readonly("num_held", &Stats::num_held)
      .def_readonly("blocks_total", &Stats::blocks_total)
      .def_readonly("blocks_free", &Stats::blocks_free)
      .def_readonly("blocks_fenced", &Stats::blocks_fenced)
      .def_readonly("slots_total", &Stats::slots_total)
      .def_readonly("slots_free", &Stats::slots_free)
      .def_readonly("slots_fenced", &Stats::slots_fenced)
      .def_readonly("steps_launched", &Stats::steps_launched)
      .def_readonly("steps_committed", &Stats::steps_committed)
      .def_readonly("num_evictions", &Stats::num_evictions)
      .def_readonly("num_finished", &Stats::num_finished)
      .def_readonly("num_transfers", &Stats::num_transfers);
}

void bind_prefix_stats(py::module_& module) {
  py::class_<PrefixStats>(module, "PrefixStats", "What the prefix cache holds and did, at one moment.")
      .def_readonly("num_lookups", &PrefixStats::num_lookups)
      .def_readonly("num_hits", &PrefixStats::num_hits)
      .def_readonly("num_prompt_tokens", &PrefixStats::num_prompt_tokens)
      .def_readonly("num_cached_tokens", &PrefixStats::num_cached_tokens)
      .def_readonly("num_waits", &PrefixStats::num_waits)
      .def_readonly("num_too_short", &PrefixStats::num_too_short)
      .def_readonly("num_pending", &PrefixStats::num_pending)
      .def_readonly("num_without_snapshot", &PrefixStats::num_without_snapshot)
      .def_readonly("num_other_salt", &PrefixStats::num_other_salt)
      .def_readonly("num_without_kv", &PrefixStats::num_without_kv)
      .def_readonly("num_blocks", &PrefixStats::num_blocks)
      .def_readonly("num_evictable_blocks", &PrefixStats::num_evictable_blocks)
      .def_readonly("num_snapshots", &PrefixStats::num_snapshots)
      .def_readonly("num_waypoints", &PrefixStats::num_waypoints)
      .def_readonly("num_snapshots_taken", &PrefixStats::num_snapshots_taken)
      .def_readonly("num_evicted_blocks", &PrefixStats::num_evicted_blocks)
      .def_readonly("num_evicted_snapshots", &PrefixStats::num_evicted_snapshots)
      .def_readonly("num_host_blocks", &PrefixStats::num_host_blocks)
      .def_readonly("num_host_snapshots", &PrefixStats::num_host_snapshots)
      .def_readonly("num_saved_blocks", &PrefixStats::num_saved_blocks)
      .def_readonly("num_saved_snapshots", &PrefixStats::num_saved_snapshots)
      .def_readonly("num_loaded_blocks", &PrefixStats::num_loaded_blocks)
      .def_readonly("num_loaded_snapshots", &PrefixStats::num_loaded_snapshots)
      .def_readonly("num_host_hits", &PrefixStats::num_host_hits);
}

}  // namespace

void bind_core_types(py::module_& module) {
  bind_constants(module);
  bind_config(module);
  bind_sampling(module);
  bind_plan(module);
  bind_commit(module);
  bind_stats(module);
  bind_prefix_stats(module);
}

}  // namespace headway
