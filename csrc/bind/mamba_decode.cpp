// The fused decode step of a Mamba-2 mixer as a Python function; in _cuda only.
#include "bind/mamba_decode.h"

#include <pybind11/pybind11.h>

#include "bind/address.h"
#include "cuda/ops.h"

namespace headway {
namespace {

void mamba_decode(int num_rows, int num_heads, int head_dim, int num_groups, int state_size, int width, Address z,
                  Address columns, Address dt, int64_t token_stride, Address conv_weight, Address conv_bias, Address a,
                  Address d, Address dt_bias, float dt_min, float dt_max, Address norm_weight, float norm_eps,
                  Address conv_state, int64_t conv_state_stride, Address ssm_state, int64_t ssm_state_stride,
                  Address row_start, Address read_slots, Address write_slots, Address out, int dtype, Address stream) {
  cuda::mamba_decode({.num_rows = num_rows,
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
                      .conv_state = conv_state,
                      .conv_state_stride = conv_state_stride,
                      .ssm_state = ssm_state,
                      .ssm_state_stride = ssm_state_stride,
                      .row_start = row_start,
                      .read_slots = read_slots,
                      .write_slots = write_slots,
                      .out = out,
                      .dtype = DType{dtype}},
                     stream);
}

}  // namespace

void bind_mamba_decode(pybind11::module_& module) {
  module.def("mamba_decode", &mamba_decode, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace headway
