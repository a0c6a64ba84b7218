#include <pybind11/pybind11.h>

#include <vector>

#include "../../problem_checks.h"
#include "../runtime/memory.h"
#include "../runtime/module.h"
#include "../runtime/tensors.h"
#include "../runtime/threads.h"
#include "../runtime/workspace.h"
#include "lora.h"

namespace py = pybind11;

namespace ctxkern {
namespace {

int64_t threads_for(const LoraCall& q, bool backward) {
  const double base = q.base.data ? static_cast<double>(q.d_in) * static_cast<double>(q.d_out) : 0;
  const double work = 2.0 * q.rows_of->count * (base + q.rank * static_cast<double>(q.d_in + q.d_out));
  return threads_worth(work, backward, q.threads);
}

// Whether arguments (x, weight, A, B, bias, adapter_index, cu_seqlens, ranks) pass the checks of ctxkern/arguments.py;
// false too where that takes a longer look, as of subclasses.
bool fits(py::handle arguments) {
  enum { kX, kWeight, kA, kB, kBias, kIndex, kBounds, kRanks, kAll };
  if (!ordinary_call(arguments)) return false;
  const auto given = py::reinterpret_borrow<py::tuple>(arguments);
  if (given.size() != kAll) return false;
  for (const int i : {kX, kA, kB})
    if (given[i].is_none()) return false;
  try {
    const Tensor x = tensor_of(given[kX]), A = tensor_of(given[kA]), B = tensor_of(given[kB]);
    if (A.ndim != 3 || B.ndim != 3 || !x.floats() || !A.mixes(x) || !B.mixes(x)) return false;
    if (!may_be_rows(x, A.sizes[0], given[kIndex], given[kBounds])) return false;
    const int64_t table = A.sizes[0], rank = A.sizes[1], d_in = x.sizes[x.ndim - 1], d_out = B.sizes[1];
    if (A.sizes[2] != d_in || !B.has_sizes({table, d_out, rank})) return false;
    if (!may_be_parameter(given[kWeight], x, {d_out, d_in}) || !may_be_parameter(given[kBias], x, {d_out}))
      return false;
    return given[kRanks].is_none() || may_be_longs(given[kRanks], x, table);
  } catch (const py::error_already_set&) {
    // not one that has memory
    return false;
  }
}

// The same of factored_modulated_linear: (x, context, weight, in_factor, context_factor, out_factor, bias, context_index,
// cu_seqlens).
bool factored_fits(py::handle arguments) {
  enum { kX, kContext, kWeight, kIn, kOf, kOut, kBias, kIndex, kBounds, kAll };
  if (!ordinary_call(arguments)) return false;
  const auto given = py::reinterpret_borrow<py::tuple>(arguments);
  if (given.size() != kAll) return false;
  for (const int i : {kX, kContext, kIn, kOf, kOut})
    if (given[i].is_none()) return false;
  try {
    const Tensor x = tensor_of(given[kX]), context = tensor_of(given[kContext]), out = tensor_of(given[kOut]);
    if (out.ndim != 2 || !x.floats() || !context.mixes(x) || !out.mixes(x)) return false;
    if (!may_be_contexts(x, context, given[kIndex], given[kBounds])) return false;
    const int64_t d_in = x.sizes[x.ndim - 1], context_dim = context.sizes[context.ndim - 1], rank = out.sizes[0];
    if (!may_be_parameter(given[kIn], x, {d_in, rank}) || !may_be_parameter(given[kOf], x, {context_dim, rank}))
      return false;
    const int64_t d_out = out.sizes[1];
    return may_be_parameter(given[kWeight], x, {d_in, d_out}) && may_be_parameter(given[kBias], x, {d_out});
  } catch (const py::error_already_set&) {
    // not one that has memory
    return false;
  }
}

// A call, and what it looks at.
struct Made {
  explicit Made(const LoraProblem& problem) {
    static_cast<LoraProblem&>(call) = problem;
    const Batch& batch = call.batch;
    grouped = group_rows(batch.sequences, batch.length, batch.tokens, batch.bounds, batch.index, batch.table, true);
    rows = grouped.view();
    first.push_back(0);
    for (int64_t u = 0; u < rows.contexts; ++u) {
      for (int64_t at = rows.first[u]; at < rows.first[u + 1]; at += kBlockRows) {
        const int64_t left = rows.first[u + 1] - at, count = left < kBlockRows ? left : kBlockRows;
        const int64_t* const map = rows.order ? rows.order + at : nullptr;
        // the rows of an adapter rise
        const bool together = !map || map[count - 1] - map[0] == count - 1;
        blocks.push_back({u, at, count, map ? map[0] : at, together ? nullptr : map});
      }
      first.push_back(static_cast<int64_t>(blocks.size()));
    }
    call.rows_of = &rows;
    call.blocks = blocks.data();
    call.block_first = first.data();
  }
  Made(const Made&) = delete;

  GroupedRows grouped;
  Rows rows;
  std::vector<LoraBlock> blocks;
  std::vector<int64_t> first;
  LoraCall call{};
};

// Row of the gates of each row of x, where one of a problem, or one in order, is for several rows of x (`Gates.length`,
// `Gates.bounds`); else nothing. Bounds rise from 0 to the number of rows.
std::vector<int64_t> gate_of_rows(const LoraProblem& q, py::handle gates) {
  std::vector<int64_t> found;
  if (gates.is_none()) return found;
  const int64_t length = PyLong_AsLongLong(entry(gates, 3, 5).ptr());
  if (length == -1 && PyErr_Occurred()) throw py::error_already_set();
  const py::handle bounds = entry(gates, 4, 5);
  if (length <= 1 && bounds.is_none()) return found;
  found.reserve(static_cast<size_t>(q.batch.tokens));
  const auto add = [&](int64_t at, int64_t count) {
    found.insert(found.end(), static_cast<size_t>(count), q.gate_of ? q.gate_of[at] : at);
  };
  if (bounds.is_none()) {
    for (int64_t at = 0; at < q.batch.tokens / length; ++at) add(at, length);
    return found;
  }
  const Tensor given = tensor_of(bounds, 1);
  const auto* const first = reinterpret_cast<const int32_t*>(given.data);
  for (int64_t at = 0; at + 1 < given.sizes[0]; ++at) add(at, first[at + 1] - first[at]);
  return found;
}

// The problem of `Operands` and `Gates`, or None, of ctxkern/lora/operands.py, without gaps where kernels read row by row.
// rows: y, or dy; gradients: dx, dA, dB, each or all None; the others: fields of the problem.
LoraProblem problem_of(py::handle operands, py::handle rows, py::handle gradients, py::handle gates, bool adds,
                       double scale, int64_t kept_from, int64_t threads) {
  const auto operand = [&](int64_t i) { return entry(operands, i, 10); };
  LoraProblem q{};
  const Tensor x = tensor_of(operand(0)), A = tensor_of(operand(2), 3), B = tensor_of(operand(3), 3);
  q.batch = batch_of(x, A.sizes[0], operand(8), operand(9));
  q.x = operand_of(x);
  q.A = operand_of(A);
  q.B = operand_of(B);
  q.d_in = x.sizes[x.ndim - 1];
  q.d_out = B.sizes[1];
  q.rank = A.sizes[1];
  q.scales = reinterpret_cast<const float*>(address_of(operand(5)));
  q.ranks = longs_of(operand(6));
  q.rows = address_of(rows);
  q.adds = adds;
  q.scale = scale;
  q.threads = threads;
  if (kept_from != 0) {
    q.kept_from = kept_from;
    q.seed = longs_of(operand(7));
  }
  if (!gradients.is_none()) {
    q.dx = address_of(entry(gradients, 0, 3));
    q.dA = address_of(entry(gradients, 1, 3));
    q.dB = address_of(entry(gradients, 2, 3));
  }
  if (!gates.is_none()) {
    const Tensor values = tensor_of(entry(gates, 0, 5), 2);
    q.gates = reinterpret_cast<const float*>(values.data);
    q.gate_rows = values.sizes[0];
    q.gate_of = longs_of(entry(gates, 1, 5));
    q.products = reinterpret_cast<float*>(address_of(entry(gates, 2, 5)));
  }
  return q;
}

// Runs a call whose gates are those of ctxkern/lora/operands.py, or None.
void run(LoraCall& q, py::handle gates, bool backward, const py::object& allocate) {
  check_problem(q, backward);
  const std::vector<int64_t> gate_of = gate_of_rows(q, gates);
  if (!gate_of.empty()) q.gate_of = gate_of.data();
  check_ranks(q);
  release_kept(kept_seconds());
  q.threads = threads_for(q, backward);
  const LoraKernels& kernels = lora_kernels_for(chosen_isa(), q.x.dtype);
  const Workspace workspace(kernels.bytes(q, backward), allocate);
  py::gil_scoped_release unlocked;
  workspace.advise();
  if (q.base.data)
    advise_huge(backward ? q.dx : q.rows, q.batch.tokens * (backward ? q.d_in : q.d_out) * size_of(q.x.dtype));
  (backward ? kernels.backward : kernels.forward)(q, workspace.data);
}

PyObject* lora(PyObject* const* given) {
  const py::handle operands = given[0], rows = given[1], gradients = given[2], gates = given[3];
  const bool adds = PyObject_IsTrue(given[4]) == 1;
  const double scale = PyFloat_AsDouble(given[5]);
  const int64_t kept_from = PyLong_AsLongLong(given[6]), threads = PyLong_AsLongLong(given[7]);
  if (PyErr_Occurred()) throw py::error_already_set();
  Made made(problem_of(operands, rows, gradients, gates, adds, scale, kept_from, threads));
  run(made.call, gates, !gradients.is_none(), py::reinterpret_borrow<py::object>(given[8]));
  Py_RETURN_NONE;
}

// Whether what kernels read row by row has no gaps, and all that torch multiplies has the dtype of x.
bool is_short(py::handle operands) {
  const auto operand = [&](int64_t i) { return entry(operands, i, 10); };
  if (operand(1).is_none()) return false;
  const Tensor x = tensor_of(operand(0));
  for (const int64_t i : {1, 4})
    if (!operand(i).is_none() && operand_of(tensor_of(operand(i))).dtype != operand_of(x).dtype) return false;
  for (const int64_t i : {5, 6, 7, 8, 9})
    if (!operand(i).is_none() && !tensor_of(operand(i)).dense()) return false;
  return x.dense();
}

// The problem of a call with a base; x stands for y or dy, and gradients are not there yet.
LoraProblem short_problem(py::handle operands, py::handle gates, double scale, int64_t threads) {
  return problem_of(operands, entry(operands, 0, 10), py::none(), gates, true, scale, 0, threads);
}

PyObject* lora_along(PyObject* const* given) {
  if (!is_short(given[0])) Py_RETURN_FALSE;
  const Made made(short_problem(given[0], py::none(), 1, 1));
  return PyBool_FromLong(takes_base(made.call));
}

PyObject* lora_forward(PyObject* const* given) {
  const py::handle operands = given[0], gates = given[1];
  const double scale = PyFloat_AsDouble(given[2]);
  const bool own = given[3] == Py_True, asked = given[4] == Py_True;
  const int64_t threads = PyLong_AsLongLong(given[5]);
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!is_short(operands)) Py_RETURN_NONE;
  const auto operand = [&](int64_t i) { return entry(operands, i, 10); };
  Made made(short_problem(operands, gates, scale, threads));
  const bool along = asked && takes_base(made.call);
  if (own && !along) Py_RETURN_NONE;
  py::object y;
  if (along) {
    const Tensor weight = tensor_of(operand(1), 2);
    y = new_rows(operand(0), tensor_of(operand(0)), weight.sizes[0]);
    made.call.base = operand_of(weight);
    made.call.bias = operand_of(operand(4), 1);
  } else {
    y = linear(operand(0), operand(1), operand(4));
  }
  made.call.rows = address_of(y);
  run(made.call, gates, false, py::reinterpret_borrow<py::object>(given[6]));
  return y.release().ptr();
}

PyObject* lora_backward(PyObject* const* given) {
  const py::handle dout = given[0], operands = given[1], needs = given[2], gates = given[3];
  const double scale = PyFloat_AsDouble(given[4]);
  const bool own = given[5] == Py_True, asked = given[6] == Py_True;
  const int64_t threads = PyLong_AsLongLong(given[7]);
  if (PyErr_Occurred()) throw py::error_already_set();
  const auto operand = [&](int64_t i) { return entry(operands, i, 10); };
  const auto needed = [&](int64_t i) { return entry(needs, i, 5).ptr() == Py_True; };
  if (!is_short(operands) || !tensor_of(dout).dense()) Py_RETURN_NONE;
  Made made(short_problem(operands, gates, scale, threads));
  LoraCall& q = made.call;
  const bool along = asked && needed(0) && takes_base(q);
  if (own && needed(0) && !along) Py_RETURN_NONE;
  const auto like = [&](int64_t i) -> py::object {
    if (!needed(i)) return py::none();
    const Tensor t = tensor_of(operand(i));
    return new_rows(operand(i), t, t.sizes[t.ndim - 1]);
  };
  const py::object dx = along || !needed(0) ? like(0) : matmul(dout, operand(1));
  q.turned = !gates.is_none();
  const auto factor = [&](int64_t i) {
    return q.turned && needed(i) ? new_turned(operand(i), tensor_of(operand(i))) : like(i);
  };
  const py::object dA = factor(2), dB = factor(3);
  py::object dweight = py::none();
  if (needed(1) && asked && takes_weight(q)) {
    dweight = empty_like(operand(1));
    q.dweight = operand_of(dweight, 2);
  }
  if (along) q.base = operand_of(operand(1), 2);
  q.rows = address_of(dout);
  q.dx = address_of(dx);
  q.dA = address_of(dA);
  q.dB = address_of(dB);
  if (needed(0) || needed(2) || needed(3) || q.products || q.dweight.data)
    run(q, gates, true, py::reinterpret_borrow<py::object>(given[8]));
  return py::make_tuple(dx, dweight, dA, dB).release().ptr();
}

// At the address of a struct of runtime/problem.py, for libraries without Python.
void fill_lora(uintptr_t address, py::handle operands, py::handle rows, py::handle gradients, py::handle gates,
               bool adds, double scale, int64_t kept_from) {
  *reinterpret_cast<LoraProblem*>(address) = problem_of(operands, rows, gradients, gates, adds, scale, kept_from, 1);
}

PyObject* lora_fits(PyObject* const* given) { return PyBool_FromLong(fits(given[0])); }

PyObject* factored_look(PyObject* const* given) { return PyBool_FromLong(factored_fits(given[0])); }

PyMethodDef methods[] = {
    method<9, lora>("lora",
                    "Runs the update: (operands, rows, (dx, dA, dB) or None, gates or None, adds, scale, kept_from, "
                    "threads, allocate); allocate(bytes) gives a tensor of bytes."),
    method<7, lora_forward>(
        "lora_forward",
        "y of (operands, gates, scale, own, along, threads, allocate), where `along` allows it with a base product "
        "that goes along with the update, else with torch's, or None where `own` forbids that; None too where weight "
        "has another dtype than x, or what is read row by row has gaps."),
    method<9, lora_backward>("lora_backward",
                             "(dx, dweight, dA, dB) of (dout, operands, needs, gates, scale, own, along, threads, "
                             "allocate), or None likewise; "
                             "dweight None too where torch's product takes less time."),
    method<1, lora_along>("lora_along", "Whether a call's base product can go along with its update."),
    method<1, lora_fits>("lora_fits", "Whether it is quick to see that arguments of lora_linear pass its checks."),
    method<1, factored_look>("factored_fits", "The same of factored_modulated_linear."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_lora(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("fill_lora", &fill_lora, "Fills the struct at an address with the same.");
}

}  // namespace ctxkern
