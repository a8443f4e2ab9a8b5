// Every layer's kernel as a Python function of addresses, sizes and a stream. One source, two modules: compiled with
// HEADWAY_BACKEND=cpu into _cpu and with HEADWAY_BACKEND=cuda into _cuda. Addresses are checked by nobody: the callers
// in python/headway/ops pass those of tensors they have checked. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/address.h"
#include "bind/backend.h"
#include "bind/step.h"

#if HEADWAY_IS_CUDA
#include "bind/mamba_decode.h"
#include "bind/moe.h"
#include "bind/route_hidden.h"
#include "bind/skinny_linear.h"
#include "cuda/runtime.h"
#else
#include "bind/linear.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#endif

namespace headway {
namespace {

namespace py = pybind11;

// --- norm.h -----------------------------------------------------------------------------------------------------

void rms_norm(int64_t num_tokens, int64_t hidden, Address x, int64_t x_stride, Address residual, float residual_scale,
              Address weight, Address out, float eps, int dtype, Address stream) {
  backend::rms_norm({.num_tokens = num_tokens,
                     .hidden = hidden,
                     .x = x,
                     .x_stride = x_stride,
                     .residual = residual,
                     .residual_scale = residual_scale,
                     .weight = weight,
                     .out = out,
                     .eps = eps,
                     .dtype = DType{dtype}},
                    stream);
}

void gated_rms_norm(int64_t num_tokens, int64_t hidden, int64_t group_size, Address y, Address z, int64_t z_stride,
                    Address weight, Address out, float eps, int dtype, Address stream) {
  backend::gated_rms_norm({.num_tokens = num_tokens,
                           .hidden = hidden,
                           .group_size = group_size,
                           .y = y,
                           .z = z,
                           .z_stride = z_stride,
                           .weight = weight,
                           .out = out,
                           .eps = eps,
                           .dtype = DType{dtype}},
                          stream);
}

// --- mamba.h ----------------------------------------------------------------------------------------------------

void causal_conv1d(int num_rows, Address query_start, Address row_start, int64_t num_tokens, int64_t num_channels,
                   int width, Address x, int64_t x_stride, Address weight, Address bias, Address state,
                   int64_t state_stride, Address read_slots, Address write_slots, Address out, int dtype,
                   Address snapshot_starts, Address snapshot_positions, Address snapshot_slots, Address stream) {
  backend::causal_conv1d({.rows = {num_rows, query_start, row_start},
                          .num_tokens = num_tokens,
                          .num_channels = num_channels,
                          .width = width,
                          .x = x,
                          .x_stride = x_stride,
                          .weight = weight,
                          .bias = bias,
                          .state = state,
                          .state_stride = state_stride,
                          .read_slots = read_slots,
                          .write_slots = write_slots,
                          .out = out,
                          .dtype = DType{dtype},
                          .snapshots = {snapshot_starts, snapshot_positions, snapshot_slots}},
                         stream);
}

void ssm_scan(int num_rows, Address query_start, Address row_start, int64_t num_tokens, int num_heads, int head_dim,
              int num_groups, int state_size, Address x, int64_t x_stride, Address b, int64_t b_stride, Address c,
              int64_t c_stride, Address dt, int64_t dt_stride, Address a, Address d, Address dt_bias, float dt_min,
              float dt_max, Address state, int64_t state_stride, int state_dtype, Address read_slots,
              Address write_slots, Address out, int dtype, int max_query_len, Address snapshot_starts,
              Address snapshot_positions, Address snapshot_slots, Address stream) {
  backend::ssm_scan({.rows = {num_rows, query_start, row_start},
                     .num_tokens = num_tokens,
                     .num_heads = num_heads,
                     .head_dim = head_dim,
                     .num_groups = num_groups,
                     .state_size = state_size,
                     .x = x,
                     .x_stride = x_stride,
                     .B = b,
                     .b_stride = b_stride,
                     .C = c,
                     .c_stride = c_stride,
                     .dt = dt,
                     .dt_stride = dt_stride,
                     .A = a,
                     .D = d,
                     .dt_bias = dt_bias,
                     .dt_min = dt_min,
                     .dt_max = dt_max,
                     .state = state,
                     .state_stride = state_stride,
                     .read_slots = read_slots,
                     .write_slots = write_slots,
                     .out = out,
                     .dtype = DType{dtype},
                     .state_dtype = DType{state_dtype},
                     .max_query_len = max_query_len,
                     .snapshots = {snapshot_starts, snapshot_positions, snapshot_slots}},
                    stream);
}

// --- attention.h ------------------------------------------------------------------------------------------------

void rotary(int64_t num_tokens, int num_heads, int num_kv_heads, int head_dim, int rotary_dim, Address q,
            int64_t q_stride, Address k, int64_t k_stride, Address positions, Address cos_sin, int dtype,
            Address stream) {
  backend::rotary({.num_tokens = num_tokens,
                   .num_heads = num_heads,
                   .num_kv_heads = num_kv_heads,
                   .head_dim = head_dim,
                   .rotary_dim = rotary_dim,
                   .q = q,
                   .q_stride = q_stride,
                   .k = k,
                   .k_stride = k_stride,
                   .positions = positions,
                   .cos_sin = cos_sin,
                   .dtype = DType{dtype}},
                  stream);
}

void kv_write(int64_t num_tokens, int num_kv_heads, int head_dim, Address k, int64_t k_stride, Address v,
              int64_t v_stride, Address positions, Address token_rows, Address rows, Address keys, Address values,
              int64_t block_stride, int block_size, Address block_table, int64_t table_stride, int dtype,
              Address stream) {
  backend::kv_write({.num_tokens = num_tokens,
                     .num_kv_heads = num_kv_heads,
                     .head_dim = head_dim,
                     .k = k,
                     .k_stride = k_stride,
                     .v = v,
                     .v_stride = v_stride,
                     .positions = positions,
                     .token_rows = token_rows,
                     .rows = rows,
                     .cache = {keys, values, block_stride, block_size, block_table, table_stride},
                     .dtype = DType{dtype}},
                    stream);
}

int64_t paged_attention_workspace_bytes(int num_rows, int64_t num_tokens, int max_query_len, int max_kv_len,
                                        int num_heads, int num_kv_heads, int head_dim) {
  PagedAttentionParams params{};
  params.rows.num_rows = num_rows;
  params.num_tokens = num_tokens;
  params.max_query_len = max_query_len;
  params.max_kv_len = max_kv_len;
  params.num_heads = num_heads;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  return backend::paged_attention_workspace_bytes(params);
}

void paged_attention(int num_rows, int64_t num_tokens, int max_query_len, int max_kv_len, int num_heads,
                     int num_kv_heads, int head_dim, Address query_start, Address row_start, Address q,
                     int64_t q_stride, Address row_ids, Address keys, Address values, int64_t block_stride,
                     int block_size, Address block_table, int64_t table_stride, float scale, Address workspace,
                     int64_t workspace_bytes, Address out, int dtype, Address stream) {
  backend::paged_attention({.rows = {num_rows, query_start, row_start},
                            .num_tokens = num_tokens,
                            .max_query_len = max_query_len,
                            .max_kv_len = max_kv_len,
                            .num_heads = num_heads,
                            .num_kv_heads = num_kv_heads,
                            .head_dim = head_dim,
                            .q = q,
                            .q_stride = q_stride,
                            .row_ids = row_ids,
                            .cache = {keys, values, block_stride, block_size, block_table, table_stride},
                            .scale = scale,
                            .workspace = workspace,
                            .workspace_bytes = workspace_bytes,
                            .out = out,
                            .dtype = DType{dtype}},
                           stream);
}

// --- moe.h ------------------------------------------------------------------------------------------------------

void activation(int64_t num_tokens, int64_t width, Address x, int64_t x_stride, Address out, int kind, bool is_gated,
                int dtype, Address stream) {
  backend::activation({.num_tokens = num_tokens,
                       .width = width,
                       .x = x,
                       .x_stride = x_stride,
                       .out = out,
                       .activation = Activation{kind},
                       .is_gated = is_gated,
                       .dtype = DType{dtype}},
                      stream);
}

void route(int64_t num_tokens, int num_experts, int top_k, int num_groups, int topk_group, int score, bool normalise,
           float scale, Address logits, Address bias, Address weights, Address expert_ids, Address stream) {
  backend::route({.num_tokens = num_tokens,
                  .num_experts = num_experts,
                  .top_k = top_k,
                  .num_groups = num_groups,
                  .topk_group = topk_group,
                  .score = RouterScore{score},
                  .normalise = normalise,
                  .scale = scale,
                  .logits = logits,
                  .bias = bias,
                  .weights = weights,
                  .expert_ids = expert_ids},
                 stream);
}

void moe_experts(int64_t num_tokens, int hidden, int width, int num_experts, int top_k, Address x, int64_t x_stride,
                 Address weights, Address expert_ids, Address w_in, Address w_out, Address inner, Address results,
                 Address out, int kind, bool is_gated, int dtype, Address stream) {
  backend::moe_experts({.num_tokens = num_tokens,
                        .hidden = hidden,
                        .width = width,
                        .num_experts = num_experts,
                        .top_k = top_k,
                        .x = x,
                        .x_stride = x_stride,
                        .weights = weights,
                        .expert_ids = expert_ids,
                        .w_in = w_in,
                        .w_out = w_out,
                        .inner = inner,
                        .results = results,
                        .out = out,
                        .activation = Activation{kind},
                        .is_gated = is_gated,
                        .dtype = DType{dtype}},
                       stream);
}

void bind_kernels(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def("rms_norm", &rms_norm, Unlocked());
  module.def("gated_rms_norm", &gated_rms_norm, Unlocked());
  module.def("causal_conv1d", &causal_conv1d, Unlocked());
  module.def("ssm_scan", &ssm_scan, Unlocked());
  module.def("rotary", &rotary, Unlocked());
  module.def("kv_write", &kv_write, Unlocked());
  module.def("paged_attention_workspace_bytes", &paged_attention_workspace_bytes);
  module.def("paged_attention", &paged_attention, Unlocked());
  module.def("activation", &activation, Unlocked());
  module.def("route", &route, Unlocked());
  module.def("moe_experts", &moe_experts, Unlocked());
  bind_step(module);
}

#if HEADWAY_IS_CUDA
void bind_backend(py::module_& module) {
  bind_mamba_decode(module);
  bind_moe(module);
  bind_route_hidden(module);
  bind_skinny_linear(module);
  module.def("sample_scan_bytes", &cuda::sample_scan_bytes);
  module.def("sample_scratch_bytes", &cuda::sample_scratch_bytes);
  module.def("device_count", &cuda::device_count);
  module.def("driver_version", &cuda::driver_version);
  module.def("pinned_alloc",
             [](int64_t num_bytes) { return reinterpret_cast<uintptr_t>(cuda::pinned_alloc(num_bytes)); });
  module.def("pinned_free", [](Address memory) { cuda::pinned_free(memory); });
  // Keeps the interpreter's lock: it takes a few microseconds, getting the lock back from a busy thread milliseconds.
  module.def("launch_graph",
             [](Address graph, Address stream, int device_idx, Address inbox, Address news, int64_t news_bytes) {
               cuda::launch_graph(graph, stream, device_idx, inbox, static_cast<const void*>(news), news_bytes);
             });
}
#else
void bind_backend(py::module_& module) {
  bind_linear(module);
  module.def("set_num_threads", &cpu::set_num_threads);
  module.def("simd_levels", &cpu::simd_levels);
  module.def("set_simd_level", &cpu::set_simd_level);
}
#endif

}  // namespace
}  // namespace headway

PYBIND11_MODULE(HEADWAY_EXPAND(_, HEADWAY_BACKEND), module) {
  headway::bind_kernels(module);
  headway::bind_backend(module);
}
