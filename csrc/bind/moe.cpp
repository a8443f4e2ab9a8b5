// Mixture of experts as Python functions: what is in _cuda only.
#include "bind/moe.h"

#include <pybind11/pybind11.h>

#include "bind/address.h"
#include "cuda/ops.h"

namespace headway {
namespace {

void combine_experts(int64_t num_tokens, int hidden, int top_k, Address results, Address places, Address weights,
                     Address out, int dtype, Address stream) {
  cuda::combine_experts({.num_tokens = num_tokens,
                         .hidden = hidden,
                         .top_k = top_k,
                         .results = results,
                         .places = places,
                         .weights = weights,
                         .out = out,
                         .dtype = DType{dtype}},
                        stream);
}

}  // namespace

void bind_moe(pybind11::module_& module) {
  module.def("combine_experts", &combine_experts, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("has_warpgroup_experts", &cuda::has_warpgroup_experts);
}

}  // namespace headway
