#include <pybind11/pybind11.h>

#include "../runtime/module.h"
#include "../runtime/tensors.h"
#include "../runtime/threads.h"
#include "../runtime/workspace.h"
#include "lora.h"

namespace py = pybind11;

namespace ctxkern {
namespace {

// Of `Operands` of ctxkern/factored/operands.py.
enum { kX, kContext, kWeight, kIn, kFactor, kOut, kBias, kIndex, kBounds, kAll };

struct MadeGates {
  MadeGates(py::handle operands, py::handle threads, bool backward) {
    const Tensor x = tensor_of(entry(operands, kX, kAll)), context = tensor_of(entry(operands, kContext, kAll)),
                 factor = tensor_of(entry(operands, kFactor, kAll), 2);
    call.context = operand_of(context);
    call.factor = operand_of(factor);
    call.context_dim = factor.sizes[0];
    call.rank = factor.sizes[1];
    const bool per_token = context.ndim == 3;
    call.table = per_token ? context.sizes[0] * context.sizes[1] : context.sizes[0];
    if (!context.dense() || context.sizes[context.ndim - 1] != call.context_dim)
      throw std::invalid_argument("context has gaps, or other columns than context_factor has rows");
    call.count = call.table;
    int64_t tokens = call.table;
    if (!per_token) {
      const Batch batch = batch_of(x, call.table, entry(operands, kIndex, kAll), entry(operands, kBounds, kAll));
      grouped = group_rows(batch.sequences, batch.length, batch.tokens, batch.bounds, batch.index, batch.table);
      rows = grouped.view();
      call.count = rows.contexts;
      call.slot = rows.slot;
      call.first = rows.first;
      call.order = rows.order;
      tokens = batch.tokens;
    }
    const double each = 2.0 * static_cast<double>(call.context_dim * call.rank);
    const double summed = backward ? 4.0 * static_cast<double>(tokens * call.rank) : 0;
    const int64_t most = PyLong_AsLongLong(threads.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    call.threads = threads_worth(each * static_cast<double>(call.count) + summed, backward, most);
  }
  MadeGates(const MadeGates&) = delete;

  void run(bool backward, py::handle allocate) const {
    const LoraKernels& kernels = lora_kernels_for(chosen_isa(), Dtype::f32);
    const Workspace workspace(kernels.gate_bytes(call, backward), py::reinterpret_borrow<py::object>(allocate));
    py::gil_scoped_release unlocked;
    (backward ? kernels.gate_gradients : kernels.gates)(call, workspace.data);
  }

  GroupedRows grouped;
  Rows rows{};
  GateCall call{};
};

PyObject* gates(PyObject* const* given) {
  MadeGates made(given[0], given[2], false);
  made.call.values = reinterpret_cast<float*>(address_of(given[1]));
  made.run(false, given[3]);
  Py_RETURN_NONE;
}

PyObject* gate_gradients(PyObject* const* given) {
  MadeGates made(given[0], given[4], true);
  made.call.products = reinterpret_cast<const float*>(address_of(given[1]));
  const auto like = [&](int operand, PyObject* needed) -> py::object {
    if (needed != Py_True) return py::none();
    const py::handle of = entry(given[0], operand, kAll);
    const Tensor t = tensor_of(of);
    return new_rows(of, t, t.sizes[t.ndim - 1]);
  };
  const py::object dcontext = like(kContext, given[2]), dfactor = like(kFactor, given[3]);
  made.call.dcontext = address_of(dcontext);
  made.call.dfactor = address_of(dfactor);
  made.run(true, given[5]);
  return py::make_tuple(dcontext, dfactor).release().ptr();
}

PyMethodDef methods[] = {
    method<4, gates>("gates",
                     "Writes the gates of contexts in use: (operands, values, threads, allocate), of `Operands` of "
                     "ctxkern/factored/operands.py without gaps in context, index and bounds."),
    method<6, gate_gradients>("gate_gradients",
                              "(dcontext, dfactor) of (operands, products, whether the first is needed, whether the "
                              "second is, threads, allocate), None where not needed."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_gates(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace ctxkern
