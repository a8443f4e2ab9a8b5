// The decode step of a Mamba-2 mixer over slot windows as a Python function; in _cuda only.
#include "bind/mamba_decode.h"

#include <pybind11/pybind11.h>

#include "bind/address.h"
#include "cuda/ops.h"

namespace headway {
namespace {

StateLogParams state_log(Address columns, int64_t columns_stride, Address dt, int64_t dt_stride, Address raw,
                         int64_t raw_stride, int num_entries, int num_raw, int window, int max_rewind) {
  return {.columns = columns,
          .columns_stride = columns_stride,
          .dt = dt,
          .dt_stride = dt_stride,
          .raw = raw,
          .raw_stride = raw_stride,
          .num_entries = num_entries,
          .num_raw = num_raw,
          .window = window,
          .max_rewind = max_rewind};
}

void mamba_decode(int num_rows, Address query_start, Address row_start, int64_t num_tokens, int max_query_len,
                  int num_heads, int head_dim, int num_groups, int state_size, int width, Address z, Address columns,
                  Address dt, int64_t token_stride, Address conv_weight, Address conv_bias, Address a, Address d,
                  Address dt_bias, float dt_min, float dt_max, Address norm_weight, float norm_eps, int norm_group_size,
                  Address conv_state, int64_t conv_state_stride, Address ssm_state, int64_t ssm_state_stride,
                  int state_dtype, Address slots, Address state_base, Address log_columns, int64_t log_columns_stride,
                  Address log_dt, int64_t log_dt_stride, Address log_raw, int64_t log_raw_stride, int num_entries,
                  int num_raw, int window, int max_rewind, Address convolved, Address table, Address scanned,
                  Address out, int dtype, Address stream) {
  cuda::mamba_decode({.rows = {num_rows, query_start, row_start},
                      .num_tokens = num_tokens,
                      .max_query_len = max_query_len,
                      .num_heads = num_heads,
                      .head_dim = head_dim,
                      .num_groups = num_groups,
                      .state_size = state_size,
                      .width = width,
                      .z = z,
                      .columns = columns,
                      .dt = dt,
                      .token_stride = token_stride,
                      .conv_weight = conv_weight,
                      .conv_bias = conv_bias,
                      .A = a,
                      .D = d,
                      .dt_bias = dt_bias,
                      .dt_min = dt_min,
                      .dt_max = dt_max,
                      .norm_weight = norm_weight,
                      .norm_eps = norm_eps,
                      .norm_group_size = norm_group_size,
                      .conv_state = conv_state,
                      .conv_state_stride = conv_state_stride,
                      .ssm_state = ssm_state,
                      .ssm_state_stride = ssm_state_stride,
                      .slots = slots,
                      .state_base = state_base,
                      .log = state_log(log_columns, log_columns_stride, log_dt, log_dt_stride, log_raw, log_raw_stride,
                                       num_entries, num_raw, window, max_rewind),
                      .convolved = convolved,
                      .table = table,
                      .scanned = scanned,
                      .out = out,
                      .dtype = DType{dtype},
                      .state_dtype = DType{state_dtype}},
                     stream);
}

void fold_states(int num_copies, Address copies, Address state_base, int num_heads, int head_dim, int num_groups,
                 int state_size, Address a, Address dt_bias, float dt_min, float dt_max, Address conv_state,
                 int64_t conv_state_stride, Address ssm_state, int64_t ssm_state_stride, int state_dtype,
                 Address log_columns, int64_t log_columns_stride, Address log_dt, int64_t log_dt_stride,
                 Address log_raw, int64_t log_raw_stride, int num_entries, int num_raw, int window, int max_rewind,
                 int dtype, Address stream) {
  cuda::fold_states({.num_copies = num_copies,
                     .copies = copies,
                     .state_base = state_base,
                     .num_heads = num_heads,
                     .head_dim = head_dim,
                     .num_groups = num_groups,
                     .state_size = state_size,
                     .A = a,
                     .dt_bias = dt_bias,
                     .dt_min = dt_min,
                     .dt_max = dt_max,
                     .conv_state = conv_state,
                     .conv_state_stride = conv_state_stride,
                     .ssm_state = ssm_state,
                     .ssm_state_stride = ssm_state_stride,
                     .log = state_log(log_columns, log_columns_stride, log_dt, log_dt_stride, log_raw, log_raw_stride,
                                      num_entries, num_raw, window, max_rewind),
                     .dtype = DType{dtype},
                     .state_dtype = DType{state_dtype}},
                    stream);
}

}  // namespace

void bind_mamba_decode(pybind11::module_& module) {
  module.def("mamba_decode", &mamba_decode, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("fold_states", &fold_states, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace headway
