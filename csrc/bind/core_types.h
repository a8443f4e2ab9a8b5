// The core's plain types as Python classes: sizes, sampling, plan, commit, counters.
#pragma once

#include <pybind11/pybind11.h>

namespace headway {

void bind_core_types(pybind11::module_& module);

}  // namespace headway
