// Only the CPU module has it, so it is apart from kernels.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace headway {

void bind_linear(pybind11::module_& module);

}  // namespace headway
