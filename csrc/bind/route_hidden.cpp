// The router of a small batch as a Python function; in _cuda only.
#include "bind/route_hidden.h"

#include <pybind11/pybind11.h>

#include "bind/address.h"
#include "cuda/ops.h"

namespace headway {
namespace {

void route_hidden(int64_t num_tokens, int hidden, int num_experts, int top_k, int num_groups, int topk_group, int score,
                  bool normalise, float scale, Address x, int64_t x_stride, Address weight, Address logits,
                  Address num_done, Address bias, Address weights, Address expert_ids, int dtype, Address stream) {
  cuda::route_hidden({.choice = {.num_tokens = num_tokens,
                                 .num_experts = num_experts,
                                 .top_k = top_k,
                                 .num_groups = num_groups,
                                 .topk_group = topk_group,
                                 .score = RouterScore{score},
                                 .normalise = normalise,
                                 .scale = scale,
                                 .logits = nullptr,
                                 .bias = bias,
                                 .weights = weights,
                                 .expert_ids = expert_ids},
                      .hidden = hidden,
                      .x = x,
                      .x_stride = x_stride,
                      .weight = weight,
                      .logits = logits,
                      .num_done = num_done,
                      .dtype = DType{dtype}},
                     stream);
}

}  // namespace

void bind_route_hidden(pybind11::module_& module) {
  module.def("route_hidden", &route_hidden, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace headway
