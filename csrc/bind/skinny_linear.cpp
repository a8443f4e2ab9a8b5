// The product of a few tokens with a plain matrix as a Python function; in _cuda only.
#include "bind/skinny_linear.h"

#include <pybind11/pybind11.h>

#include "bind/address.h"
#include "cuda/ops.h"

namespace headway {
namespace {

void skinny_linear(int num_tokens, int num_inputs, int num_outputs, Address x, int64_t x_stride, Address weight,
                   Address bias, Address out, int64_t out_stride, bool is_added, int dtype, Address stream) {
  cuda::skinny_linear({.num_tokens = num_tokens,
                       .num_inputs = num_inputs,
                       .num_outputs = num_outputs,
                       .x = x,
                       .x_stride = x_stride,
                       .weight = weight,
                       .bias = bias,
                       .out = out,
                       .out_stride = out_stride,
                       .is_added = is_added,
                       .dtype = DType{dtype}},
                      stream);
}

}  // namespace

void bind_skinny_linear(pybind11::module_& module) {
  module.def("skinny_linear", &skinny_linear, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace headway
