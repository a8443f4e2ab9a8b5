#pragma once

#include <pybind11/pybind11.h>

namespace headway {

void bind_route_hidden(pybind11::module_& module);

}  // namespace headway
