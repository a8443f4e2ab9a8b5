// The product with a packed matrix as a Python function of addresses, sizes and a stream.
#include "bind/linear.h"

#include "bind/address.h"
#include "cpu/ops.h"

namespace headway {
namespace {

void linear(int64_t num_tokens, int64_t num_inputs, int64_t num_outputs, Address x, int64_t x_stride, Address weight,
            Address bias, Address out, int64_t out_stride, bool is_added, Address stream) {
  cpu::linear({.num_tokens = num_tokens,
               .num_inputs = num_inputs,
               .num_outputs = num_outputs,
               .x = x,
               .x_stride = x_stride,
               .weight = weight,
               .bias = bias,
               .out = out,
               .out_stride = out_stride,
               .is_added = is_added},
              stream);
}

}  // namespace

void bind_linear(pybind11::module_& module) {
  module.def("linear", &linear, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace headway
