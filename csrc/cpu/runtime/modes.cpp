#include "modes.h"

namespace py = pybind11;

namespace ctxkern {
namespace {

py::object answer_of(PyObject* answer) {
  if (answer == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

// Functions of torch, held for as long as the process lives.
struct Modes {
  Modes() {
    const auto core = py::module_::import("torch._C"), autograd = py::module_::import("torch._C._autograd"),
               functions = py::module_::import("torch._C._functorch");
    const auto held = [](const py::object& module, const char* name) {
      return py::object(module.attr(name)).release().ptr();
    };
    changes[0] = held(core, "_is_any_autocast_enabled");
    changes[1] = held(core, "_are_functorch_transforms_active");
    changes[2] = held(core, "_len_torch_dispatch_stack");
    changes[3] = held(core, "_get_tracing_state");
    changes[4] = held(autograd, "_profiler_enabled");
    grad_enabled = held(core, "is_grad_enabled");
    wraps[0] = held(functions, "is_functorch_wrapped_tensor");
    wraps[1] = held(functions, "is_legacy_batchedtensor");
    forward_ad = py::module_::import("torch.autograd.forward_ad").release().ptr();
    level = PyUnicode_InternFromString("_current_level");
  }

  PyObject *changes[5], *wraps[2], *grad_enabled, *forward_ad, *level;
};

const Modes* modes = nullptr;

// Neither None, False nor 0.
bool says(PyObject* function) {
  const int truth = PyObject_IsTrue(answer_of(PyObject_CallNoArgs(function)).ptr());
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

}  // namespace

void find_modes() {
  if (modes == nullptr) modes = new Modes;
}

bool ordinary() {
  for (PyObject* const change : modes->changes)
    if (says(change)) return false;
  const py::object level = answer_of(PyObject_GetAttr(modes->forward_ad, modes->level));
  return PyLong_AsLong(level.ptr()) < 0;
}

bool grad_enabled() { return says(modes->grad_enabled); }

bool wrapped(py::handle tensor) {
  for (PyObject* const wraps : modes->wraps)
    if (answer_of(PyObject_CallOneArg(wraps, tensor.ptr())).ptr() == Py_True) return true;
  return false;
}

}  // namespace ctxkern
