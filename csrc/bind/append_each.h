#pragma once

#include <pybind11/pybind11.h>

namespace headway {

void bind_append_each(pybind11::module_& module);

}  // namespace headway
