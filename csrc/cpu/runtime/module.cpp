#include "module.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "modes.h"
#include "tensors.h"

namespace py = pybind11;

namespace {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < ctxkern::kIsaCount; ++i) {
    const auto isa = static_cast<ctxkern::Isa>(i);
    if (ctxkern::isa_available(isa)) names.push_back(ctxkern::isa_name(isa));
  }
  return names;
}

std::string force_cpu_isa(const std::string& name) {
  const std::string before = ctxkern::isa_name(ctxkern::chosen_isa());
  ctxkern::force_isa(name.c_str());
  return before;
}

PyObject* plain(PyObject* const* given) { return PyBool_FromLong(ctxkern::plain(given[0])); }

PyObject* ordinary_call(PyObject* const* given) { return PyBool_FromLong(ctxkern::ordinary_call(given[0])); }

PyObject* ordinary_backward(PyObject* const* given) {
  const py::handle douts = given[0];
  if (!ctxkern::ordinary() || ctxkern::grad_enabled() || !ctxkern::plain(douts) || !ctxkern::plain(given[1]))
    Py_RETURN_FALSE;
  for (const py::handle each : py::reinterpret_borrow<py::tuple>(douts))
    if (ctxkern::wrapped(each)) Py_RETURN_FALSE;
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    ctxkern::method<1, plain>("plain", "Whether each of a tuple is None or a plain tensor."),
    ctxkern::method<1, ordinary_call>(
        "ordinary_call", "The same, where the first is on a CPU or GPU and nothing sees or changes the call."),
    ctxkern::method<2, ordinary_backward>(
        "ordinary_backward",
        "(gradients, others): the same of a backward; autograd is off, and no transform wraps a gradient."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of ctxkern.";
  // here, as importing under a lock of C++ would wait for Python's and the other way round
  ctxkern::find_torch();
  ctxkern::find_modes();
  m.def("cpu_isas", &cpu_isas, "The instruction sets that this build has code for and this machine runs, best last.");
  m.def(
      "cpu_isa", [] { return ctxkern::isa_name(ctxkern::chosen_isa()); },
      "The instruction set in use: the best, or the one named by CTXKERN_CPU_ISA.");
  m.def("force_cpu_isa", &force_cpu_isa,
        "Makes one of cpu_isas() the instruction set in use, for tests; returns the one before.");
  m.def("cpu_name", &ctxkern::cpu_name, "The brand string of the processor, or an empty string.");
  py::class_<ctxkern::LargeMemory>(m, "LargeMemory", py::buffer_protocol(), py::module_local(),
                                   "Memory for a large result; what is dropped waits for the next of its size.")
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer([](ctxkern::LargeMemory& memory) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(memory.data), static_cast<py::ssize_t>(memory.bytes));
      });
  m.def("kept_bytes", &ctxkern::kept_bytes, "Bytes of dropped memory that wait.");
  m.def("release_kept", &ctxkern::release_kept, py::arg("seconds") = 0.0,
        "Gives back to the system memory that has waited for so long.");
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  ctxkern::bind_modulated(m);
  ctxkern::bind_lora(m);
  ctxkern::bind_gates(m);
}
