// Python's view of the bookkeeping core; typed in python/headway/_core.pyi. Converts, locks and translates errors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bind/append_each.h"
#include "bind/core_types.h"
#include "bind/mirror.h"
#include "core/error.h"
#include "core/ledger.h"
#include "tests/check.h"

namespace py = pybind11;

namespace headway {
namespace {

using TokenArray = py::array_t<int32_t, py::array::c_style>;

// The Python types that core errors become; builtin ones until set_error_types is called.
struct ErrorTypes {
  py::object request = py::none();
  py::object capacity = py::none();
  py::object integrity = py::none();
};

// Interpreter-wide like the types it holds; never destroyed, since the interpreter may be gone by then.
ErrorTypes& error_types() {
  static auto* types = new ErrorTypes();
  return *types;
}

void raise_request_error(const py::object& type, const RequestError& error) {
  if (type.is_none()) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return;
  }
  const py::object raised = type(error.parameter(), error.value(), error.limit(), py::arg("hint") = error.hint());
  PyErr_SetObject(type.ptr(), raised.ptr());
}

void translate_error(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const CapacityError& error) {
    raise_request_error(error_types().capacity, error);
  } catch (const RequestError& error) {
    raise_request_error(error_types().request, error);
  } catch (const IntegrityError& error) {
    const py::object& type = error_types().integrity;
    PyErr_SetString(type.is_none() ? PyExc_RuntimeError : type.ptr(), error.what());
  }
}

// One caller at a time. The GIL is always given up before the lock is awaited, so the two cannot wait for each other.
class LockedLedger {
 public:
  LockedLedger(const LedgerConfig& config, uintptr_t packet_ring, uintptr_t result_ring)
      : ledger_(config, reinterpret_cast<uint8_t*>(packet_ring), reinterpret_cast<uint8_t*>(result_ring)) {}

  template <typename Call>
  auto with(Call&& call) {
    const py::gil_scoped_release no_gil;
    const std::lock_guard lock(mutex_);
    return call(ledger_);
  }

 private:
  std::mutex mutex_;
  Ledger ledger_;
};

std::span<const int32_t> as_span(const TokenArray& tokens) {
  if (tokens.ndim() != 1) throw RequestError("prompt.ndim", tokens.ndim(), "1");
  return {tokens.data(), static_cast<size_t>(tokens.size())};
}

std::unique_ptr<CommitRecord> commit(LockedLedger& ledger) {
  auto changes = std::make_unique<CommitRecord>();
  const bool has_committed = ledger.with([&](Ledger& core) { return core.commit(*changes); });
  return has_committed ? std::move(changes) : nullptr;
}

TokenArray output_tokens(LockedLedger& ledger, int64_t request_id) {
  const std::vector<int32_t> tokens = ledger.with([&](Ledger& core) {
    const auto outputs = core.output_tokens(request_id);
    return std::vector<int32_t>(outputs.begin(), outputs.end());
  });
  return TokenArray(static_cast<py::ssize_t>(tokens.size()), tokens.data());
}

std::optional<Transfer> next_transfer(LockedLedger& ledger) {
  return ledger.with([](Ledger& core) {
    const Transfer* transfer = core.next_transfer();
    return transfer == nullptr ? std::nullopt : std::optional(*transfer);
  });
}

// [n, 2]
TokenArray as_table(const std::vector<RecordMove>& moves) {
  const auto num_moves = static_cast<py::ssize_t>(moves.size());
  return TokenArray(std::vector<py::ssize_t>{num_moves, 2}, reinterpret_cast<const int32_t*>(moves.data()));
}

int64_t add_request(LockedLedger& ledger, const TokenArray& prompt, const SamplingSpec& sampling,
                    int32_t max_new_tokens, int32_t priority, const std::string& salt, bool uses_cache) {
  const auto tokens = as_span(prompt);
  return ledger.with(
      [&](Ledger& core) { return core.add(tokens, sampling, max_new_tokens, priority, salt, uses_cache); });
}

// One request id in, whether anything changed out.
auto switch_request(bool (Ledger::*method)(int64_t)) {
  return [method](LockedLedger& ledger, int64_t request_id) {
    return ledger.with([&](Ledger& core) { return (core.*method)(request_id); });
  };
}

std::vector<int32_t> free_slots(LockedLedger& ledger) {
  return ledger.with([](Ledger& core) {
    const FencedPool& ids = core.slots().ids();
    std::vector<int32_t> slots;
    for (int32_t id = 1; id <= ids.num_total(); ++id) {
      if (ids.state(id) == FencedPool::State::kFree) slots.push_back(id);
    }
    return slots;
  });
}

bool finish_request(LockedLedger& ledger, int64_t request_id, int32_t num_output_tokens) {
  return ledger.with([&](Ledger& core) { return core.finish(request_id, num_output_tokens); });
}

bool rewind_request(LockedLedger& ledger, int64_t request_id, int32_t num_positions) {
  return ledger.with([&](Ledger& core) { return core.rewind(request_id, num_positions); });
}

void check_mirror(LockedLedger& ledger, const py::tuple& record) {
  const DeviceMirror mirror = mirror_from(record);
  ledger.with([&](Ledger& core) { core.check_mirror(mirror); });
}

bool set_token_mask(LockedLedger& ledger, int64_t request_id, int32_t num_tokens,
                    const py::array_t<uint32_t, py::array::c_style>& mask) {
  const std::span<const uint32_t> words(mask.data(), static_cast<size_t>(mask.size()));
  return ledger.with([&](Ledger& core) { return core.set_token_mask(request_id, num_tokens, words); });
}

template <typename Value>
auto get(Value (Ledger::*method)() const) {
  return [method](LockedLedger& ledger) { return ledger.with([&](Ledger& core) { return (core.*method)(); }); };
}

void bind_transfer(py::module_& module) {
  py::class_<Transfer>(module, "Transfer", "Copies between device and host memory.")
      .def_readonly("is_out", &Transfer::is_out, "From the device to host memory.")
      .def_property_readonly(
          "blocks", [](const Transfer& transfer) { return as_table(transfer.blocks); }, "[n, 2] int32 source, target")
      .def_property_readonly(
          "slots", [](const Transfer& transfer) { return as_table(transfer.slots); }, "[m, 2] int32 source, target");
}

void bind_ledger(py::module_& module) {
  using namespace pybind11::literals;
  py::class_<LockedLedger>(module, "Ledger",
                           "The host's truth: rows, blocks, slots, the plan of each step and the commit of its "
                           "results. Calls from several threads are taken one at a time.")
      .def(py::init<const LedgerConfig&, uintptr_t, uintptr_t>(), "config"_a, "packet_ring_address"_a = 0,
           "result_ring_address"_a = 0, "Addresses: 64-byte aligned memory that outlives the ledger; 0: its own.")
      .def("add", &add_request, "prompt"_a, "sampling"_a, py::kw_only(), "max_new_tokens"_a, "priority"_a = 0,
           "salt"_a = py::bytes(), "uses_cache"_a = true,
           "Queues a request and returns its id. Raises CapacityError if it can never fit, RequestError on bad ids.")
      .def(
          "plan", [](LockedLedger& ledger) { return ledger.with([](Ledger& core) { return core.plan(); }); },
          "Plans the next step; None when nothing can run or max_launch_depth + 1 steps are in flight.")
      .def("is_ready", get(&Ledger::is_ready), "True when the oldest launched step's results are in the ring.")
      .def("commit", &commit,
           "Retires the oldest launched step; None when its results are not there. Raises "
           "IntegrityError when host and device disagree; the ledger is then unusable.")
      .def("next_transfer", &next_transfer,
           "What to copy between device and host memory now, beside the steps; None: nothing more.")
      .def(
          "finish_transfer",
          [](LockedLedger& ledger, bool is_out) { ledger.with([=](Ledger& core) { core.finish_transfer(is_out); }); },
          "is_out"_a, "The oldest that was begun, out or back, is done.")
      .def("abort", switch_request(&Ledger::abort), "request_id"_a, "False when it is unknown or already over.")
      .def("finish", &finish_request, "request_id"_a, "num_output_tokens"_a,
           "Ends the request as FINISH_STOP with its first num_output_tokens outputs; False when it is over.")
      .def("set_token_mask", &set_token_mask, "request_id"_a, "num_tokens"_a, "mask"_a,
           "What a guided request may sample after so many tokens; False when it is over or has another length.")
      .def("pause", switch_request(&Ledger::pause), "request_id"_a,
           "Stops planning the request. It keeps its memory unless a request of its priority or above lacks it.")
      .def("resume", switch_request(&Ledger::resume), "request_id"_a)
      .def("evict", switch_request(&Ledger::evict), "request_id"_a,
           "Takes the request's memory back; it waits at the head of its priority and is recomputed.")
      .def("rewind", &rewind_request, "request_id"_a, "num_positions"_a,
           "Drops what is in flight of the request and its last num_positions outputs; it goes on from there. Raises "
           "RequestError, changing nothing, where its KV or state cannot go back so far; False when it is over.")
      .def("admitted_requests", get(&Ledger::admitted_requests),
           "Ids of the requests that got a row in the last plan() and still hold it.")
      .def("output_tokens", &output_tokens, "request_id"_a,
           "[n] int32 committed outputs; of a request that is over only until the next plan().")
      .def_property_readonly("num_in_flight", get(&Ledger::num_in_flight))
      .def_property_readonly("has_unfinished", get(&Ledger::has_unfinished))
      .def("stats", get(&Ledger::stats))
      .def("check_integrity", get(&Ledger::check_integrity), "Raises IntegrityError naming the first broken invariant.")
      .def(
          "check_mirror", &check_mirror, "mirror"_a,
          "Raises IntegrityError naming the first field of the mirror that is not as the host has it. Addresses are of "
          "a copy in host memory, of a device that has run every launched step.")
      .def("free_slots", &free_slots, "State slots that nobody holds and no launched step names.")
      .def("prefix_stats", get(&Ledger::prefix_stats))
      .def(
          "reset_prefix_cache",
          [](LockedLedger& ledger) { ledger.with([](Ledger& core) { core.reset_prefix_cache(); }); },
          "No later request finds what is cached now, or what running ones compute.");
}

void bind_checks(py::module_& module) {
  using namespace pybind11::literals;
  module.def(
      "run_checks",
      [](const std::string& filter) {
        py::list results;
        for (const auto& result : checks::run_checks(filter)) {
          results.append(py::make_tuple(result.name, result.has_passed, result.message));
        }
        return results;
      },
      "filter"_a = "", "Runs the C++ checks whose name contains filter: (name, passed, message) each.");
  module.def("check_names", [] {
    std::vector<std::string> names;
    for (const auto& check : checks::check_cases()) names.push_back(check.name);
    return names;
  });
  module.def(
      "set_error_types",
      [](py::object request_error, py::object capacity_error, py::object integrity_error) {
        error_types() = {std::move(request_error), std::move(capacity_error), std::move(integrity_error)};
      },
      "request_error"_a, "capacity_error"_a, "integrity_error"_a, "Python types that core errors are raised as.");
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Headway's bookkeeping core: no CUDA, no torch, no tensors.";
  py::register_exception_translator(&translate_error);
  bind_core_types(module);
  bind_transfer(module);
  bind_ledger(module);
  bind_checks(module);
  bind_append_each(module);
}

}  // namespace headway
