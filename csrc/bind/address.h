// Addresses as Python passes them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace headway {

// What Python passes for a pointer: tensor.data_ptr(), or 0 for null.
struct Address {
  uintptr_t value;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

}  // namespace headway

namespace pybind11::detail {

template <>
struct type_caster<headway::Address> {
  PYBIND11_TYPE_CASTER(headway::Address, const_name("int"));
  bool load(handle source, bool) {
    value.value = static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(source.ptr()));
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  }
};

}  // namespace pybind11::detail
