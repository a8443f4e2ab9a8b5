// One token to each of many Python lists, in as few steps through memory as that takes. Knows no request.
#include "bind/append_each.h"

#include <pybind11/numpy.h>

#include <string>

namespace py = pybind11;

namespace headway {
namespace {

using TokenArray = py::array_t<int32_t, py::array::c_style>;

void fetch(const void* address) {
  __builtin_prefetch(address, /*rw=*/1);
}

// After a long step nothing of the lists is in the processor's caches: one by one, each would be waited for twice, for
// its head and for the place behind its last token.
void append_each(const py::list& lists, const TokenArray& tokens) {
  const auto num_lists = static_cast<py::ssize_t>(lists.size());
  if (tokens.ndim() != 1 || tokens.size() != num_lists) {
    throw py::value_error("append_each: " + std::to_string(num_lists) + " lists and " + std::to_string(tokens.size()) +
                          " tokens");
  }
  const auto at = [&](py::ssize_t i) { return PyList_GET_ITEM(lists.ptr(), i); };
  for (py::ssize_t i = 0; i < num_lists; ++i) fetch(at(i));
  for (py::ssize_t i = 0; i < num_lists; ++i) {
    if (!PyList_Check(at(i))) throw py::type_error("append_each: not a list of lists");
    const auto* list = reinterpret_cast<const PyListObject*>(at(i));
    fetch(list->ob_item + Py_SIZE(list));
  }
  for (py::ssize_t i = 0; i < num_lists; ++i) {
    const auto token = py::int_(tokens.data()[i]);
    if (PyList_Append(at(i), token.ptr()) != 0) throw py::error_already_set();
  }
}

}  // namespace

void bind_append_each(py::module_& module) {
  using namespace pybind11::literals;
  module.def("append_each", &append_each, "lists"_a, "tokens"_a,
             "lists[i].append(tokens[i]) for all i. Raises ValueError or TypeError, changing nothing, where there are "
             "not as many lists as tokens.");
}

}  // namespace headway
