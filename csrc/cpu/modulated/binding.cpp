#include <pybind11/pybind11.h>

#include <string>

#include "../../problem_checks.h"
#include "../runtime/memory.h"
#include "../runtime/module.h"
#include "../runtime/tensors.h"
#include "../runtime/threads.h"
#include "../runtime/workspace.h"
#include "modulated.h"

namespace py = pybind11;

namespace ctxkern {
namespace {

int64_t threads_for(const Call& q, bool backward) {
  double columns = 0;
  for (int i = 0; i < q.projections; ++i) columns += static_cast<double>(q.projection[i].d_out);
  const double rows = static_cast<double>(q.batch.tokens + q.rows->contexts * q.context_dim) *
                      static_cast<double>(q.outer ? q.context_dim : 1);
  return threads_worth(2 * rows * static_cast<double>(q.d_in) * columns, backward, q.threads);
}

// Whether arguments (x, context, weight, bilinear, bias, context_index, cu_seqlens) pass the checks of
// ctxkern/arguments.py; false too where that takes a longer look, as of subclasses.
bool fits(py::handle arguments) {
  enum { kX, kContext, kWeight, kBilinear, kBias, kIndex, kBounds, kAll };
  if (!ordinary_call(arguments)) return false;
  const auto given = py::reinterpret_borrow<py::tuple>(arguments);
  if (given.size() != kAll) return false;
  for (const int i : {kX, kContext, kBilinear})
    if (given[i].is_none()) return false;
  try {
    const Tensor x = tensor_of(given[kX]), context = tensor_of(given[kContext]), bilinear = tensor_of(given[kBilinear]);
    if (bilinear.ndim != 3 || !x.floats() || !may_be_contexts(x, context, given[kIndex], given[kBounds])) return false;
    const int64_t d_in = x.sizes[x.ndim - 1], d_out = bilinear.sizes[1], context_dim = context.sizes[context.ndim - 1];
    if (!context.mixes(x) || !bilinear.mixes(x) || !bilinear.has_sizes({d_in, d_out, context_dim})) return false;
    return may_be_parameter(given[kWeight], x, {d_in, d_out}) && may_be_parameter(given[kBias], x, {d_out});
  } catch (const py::error_already_set&) {
    // not one that has memory
    return false;
  }
}

// The problem of `Operands` and `Gradients`, or None in a forward, of ctxkern/modulated/operands.py. rows: y of each
// projection, or dy. A context per token is a table of N rows for N sequences of one row each.
Problem problem_of(py::handle operands, py::handle rows, py::handle grads, double outer_above, int64_t workspace_bytes,
                   int64_t threads) {
  const auto operand = [&](int64_t i) { return entry(operands, i, 7); };
  Problem q{};
  q.outer_above = outer_above;
  q.workspace_bytes = workspace_bytes;
  q.threads = threads;
  const Tensor x = tensor_of(operand(0)), context = tensor_of(operand(1));
  if (context.ndim == 3) {
    if (x.ndim != 3) throw std::invalid_argument("x is packed beside a context per token");
    const int64_t tokens = x.sizes[0] * x.sizes[1];
    q.batch = Batch{nullptr, nullptr, tokens, tokens, 1, tokens};
  } else {
    q.batch = batch_of(x, context.sizes[0], operand(5), operand(6));
  }
  q.x = operand_of(x);
  q.context = operand_of(context);
  q.d_in = x.sizes[x.ndim - 1];
  q.context_dim = context.sizes[context.ndim - 1];
  const bool backward = !grads.is_none();
  const auto gradient = [&](int64_t i) { return entry(grads, i, 5); };
  if (backward) {
    q.dx = address_of(gradient(0));
    q.dcontext = address_of(gradient(1));
  }
  q.projections = static_cast<int64_t>(PySequence_Size(rows.ptr()));
  for (int64_t i = 0; i < q.projections && i < kMaxProjections; ++i) {
    Projection& p = q.projection[i];
    const auto each = [&](int64_t list) { return entry(operand(list), i, q.projections); };
    const Tensor bilinear = tensor_of(each(3), 3);
    p.d_out = bilinear.sizes[1];
    p.bilinear = operand_of(bilinear);
    p.weight = operand_of(each(2), 2);
    p.rows = address_of(entry(rows, i, q.projections));
    if (backward) {
      p.dweight = operand_of(entry(gradient(2), i, q.projections), 2);
      p.dbilinear = operand_of(entry(gradient(3), i, q.projections), 3);
    } else {
      p.bias = operand_of(each(4), 1);
    }
  }
  return q;
}

// A call, and the rows that it looks at.
struct Made {
  Made(const Problem& problem, bool backward) {
    static_cast<Problem&>(call) = problem;
    const Batch& batch = call.batch;
    grouped = group_rows(batch.sequences, batch.length, batch.tokens, batch.bounds, batch.index, batch.table);
    rows = grouped.view();
    call.rows = &rows;
    call.outer = static_cast<double>(rows.contexts) > call.outer_above;
    call.threads = threads_for(call, backward);
  }
  Made(const Made&) = delete;

  GroupedRows grouped;
  Rows rows;
  Call call;
};

const Kernels& kernels_of(const Call& q) { return kernels_for(chosen_isa(), q.x.dtype); }

void advise(const Call& q, bool backward) {
  const int64_t size = size_of(q.x.dtype);
  if (backward) advise_huge(q.dx, q.batch.tokens * q.d_in * size);
  for (int i = 0; i < q.projections; ++i) {
    const Projection& p = q.projection[i];
    if (!backward) advise_huge(p.rows, q.batch.tokens * p.d_out * size);
    advise_huge(p.dbilinear.data, q.d_in * p.d_out * q.context_dim * size_of(p.dbilinear.dtype));
  }
}

// Bytes of a result from which on memory for large ones pays (ctxkern/runtime/memory.py).
constexpr int64_t kLarge = 8 << 20;

// What the functions of Python below take last: (terms, workspace_bytes, threads, allocate). terms: as `cpu_terms` of
// ctxkern/modulated/plan.py; allocate(bytes): a tensor of bytes.
struct Limits {
  explicit Limits(PyObject* const* given)
      : terms(given[0]),
        workspace_bytes(PyLong_AsLongLong(given[1])),
        threads(PyLong_AsLongLong(given[2])),
        allocate(py::reinterpret_borrow<py::object>(given[3])) {
    if (PyErr_Occurred()) throw py::error_already_set();
  }

  py::handle terms;
  int64_t workspace_bytes, threads;
  py::object allocate;
};

int64_t projections_of(py::handle operands) {
  return static_cast<int64_t>(PySequence_Size(entry(operands, 2, 7).ptr()));
}

// The number of contexts above which the outer form takes less time. terms: those of `cpu_terms`, by words.
double outer_above(py::handle operands, py::handle terms) {
  const Tensor x = tensor_of(entry(operands, 0, 7)), context = tensor_of(entry(operands, 1, 7));
  if (context.ndim == 3) return -1;
  int64_t tokens = 1, bytes = 0, row = 0;
  for (int64_t i = 0; i + 1 < x.ndim; ++i) tokens *= x.sizes[i];
  const py::handle bilinears = entry(operands, 3, 7);
  const int64_t projections = projections_of(operands);
  for (int64_t i = 0; i < projections; ++i) {
    const Tensor bilinear = tensor_of(entry(bilinears, i, projections), 3);
    if (bilinear.bytes() >= bytes) bytes = bilinear.bytes(), row = bilinear.sizes[2] * bilinear.bits / 8;
  }
  const int64_t shared = row % 64 == 0 ? 0 : 2;  // lines
  const bool pairs = operand_of(x).dtype == Dtype::bf16 && chosen_isa() >= Isa::avx512_bf16;
  const py::handle chosen = entry(terms, pairs ? 2 : chosen_isa() >= Isa::avx512 ? 1 : 0, 3);
  const auto term = [&](int64_t i) { return PyFloat_AsDouble(entry(chosen, i, 7).ptr()); };
  const double beyond = static_cast<double>(bytes) > term(3 + shared) ? term(2 + shared) : 0;
  const double fixed = beyond + term(6) * static_cast<double>(context.sizes[1]);
  const double above = (term(0) * static_cast<double>(tokens) + fixed) / term(1);
  if (PyErr_Occurred()) throw py::error_already_set();
  return above;
}

void run(py::handle operands, py::handle rows, py::handle grads, const Limits& limits) {
  const bool backward = !grads.is_none();
  const Problem problem =
      problem_of(operands, rows, grads, outer_above(operands, limits.terms), limits.workspace_bytes, limits.threads);
  check_problem(problem, backward);
  release_kept(kept_seconds());
  const Made made(problem, backward);
  const Kernels& kernels = kernels_of(made.call);
  const Tiles tiles = kernels.tiles(made.call, backward);
  const Workspace workspace(tiles.bytes, limits.allocate);
  py::gil_scoped_release unlocked;
  advise(made.call, backward);
  workspace.advise();
  (backward ? kernels.backward : kernels.forward)(made.call, tiles, workspace.data);
}

// Whether what kernels read row by row has no gaps.
bool without_gaps(py::handle operands) {
  const auto operand = [&](int64_t i) { return entry(operands, i, 7); };
  for (const int64_t i : {0, 1, 5, 6})
    if (!operand(i).is_none() && !tensor_of(operand(i)).dense()) return false;
  return all_dense(operand(4));
}

PyObject* forward(PyObject* const* given) {
  if (!without_gaps(given[0])) Py_RETURN_NONE;
  const py::handle operands = given[0], x = entry(operands, 0, 7), bilinears = entry(operands, 3, 7);
  const Tensor rows = tensor_of(x);
  const int64_t projections = projections_of(operands);
  py::list outs(projections);
  for (int64_t i = 0; i < projections; ++i)
    outs[i] = new_rows(x, rows, tensor_of(entry(bilinears, i, projections), 3).sizes[1]);
  run(operands, outs, py::none(), Limits(given + 1));
  return outs.release().ptr();
}

PyObject* backward(PyObject* const* given) {
  if (!all_dense(given[0]) || !without_gaps(given[1])) Py_RETURN_NONE;
  const py::handle douts = given[0], operands = given[1], needs = given[2], large = given[3];
  const auto projections = static_cast<int64_t>(PySequence_Size(douts.ptr()));
  bool any = false;  // is for the kernels
  const auto made = [&](py::handle need, py::handle of, auto&& make) -> py::object {
    if (need.ptr() != Py_True) return py::none();
    any = true;
    return make(of);
  };
  const auto each = [&](int64_t operand, int64_t gradient, auto&& make) {
    const py::handle tensors = entry(operands, operand, 7), wanted = entry(needs, gradient, 5);
    py::list found(projections);
    for (int64_t i = 0; i < projections; ++i)
      found[i] = made(entry(wanted, i, projections), entry(tensors, i, projections), make);
    return found;
  };
  const py::tuple grads = py::make_tuple(
      made(entry(needs, 0, 5), entry(operands, 0, 7), empty_like),
      made(entry(needs, 1, 5), entry(operands, 1, 7), empty_like), each(2, 2, empty_like),
      each(3, 3, [&](py::handle of) { return tensor_of(of).bytes() < kLarge ? empty_like(of) : large(of); }),
      py::list(projections));
  if (any) run(operands, douts, grads, Limits(given + 4));
  const py::handle biases = entry(operands, 4, 7), wanted = entry(needs, 4, 5);
  py::list dbiases(projections);
  for (int64_t i = 0; i < projections; ++i) {
    const py::handle dout = entry(douts, i, projections);
    dbiases[i] = entry(wanted, i, projections).ptr() == Py_True
                     ? sum_of_rows(dout, tensor_of(dout).ndim, entry(biases, i, projections))
                     : py::none();
  }
  return py::make_tuple(grads[0], grads[1], grads[2], grads[3], dbiases).release().ptr();
}

py::dict modulated_tiles(py::handle operands, py::handle rows, py::handle grads, py::handle terms,
                         int64_t workspace_bytes, int64_t threads) {
  const bool backward = !grads.is_none();
  const Made made(problem_of(operands, rows, grads, outer_above(operands, terms), workspace_bytes, threads), backward);
  const Tiles tiles = kernels_of(made.call).tiles(made.call, backward);
  py::dict found;
  found["outer"] = made.call.outer;
  found["contexts"] = made.rows.contexts;
  found["strip"] = tiles.strip;
  found["group"] = tiles.group;
  found["workspace_bytes"] = tiles.weights_bytes;
  return found;
}

// At the address of a struct of runtime/problem.py, for libraries without Python.
void fill_modulated(uintptr_t address, py::handle operands, py::handle rows, py::handle grads, double outer_above,
                    int64_t workspace_bytes) {
  *reinterpret_cast<Problem*>(address) = problem_of(operands, rows, grads, outer_above, workspace_bytes, 1);
}

PyObject* modulated_fits(PyObject* const* given) { return PyBool_FromLong(fits(given[0])); }

PyMethodDef methods[] = {
    method<5, forward>(
        "modulated_forward",
        "[y], one per projection, of (operands, terms, workspace_bytes, threads, allocate); None where what is "
        "read row by row has gaps."),
    method<8, backward>(
        "modulated_backward",
        "The gradients that `needs` asks for, or None likewise, of (douts, operands, needs, large, terms, "
        "workspace_bytes, threads, allocate); large(bilinear) makes the memory of a gradient of 8 MiB and more."),
    method<1, modulated_fits>("modulated_fits",
                              "Whether it is quick to see that arguments of modulated_linear pass its checks."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_modulated(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("problem_layout", &problem_layout, "Where the fields of a problem lie; runtime/problem.py must agree.");
  m.def("modulated_tiles", &modulated_tiles, "How `modulated` would run the same.");
  m.def("fill_modulated", &fill_modulated, "Fills the struct at an address with the same.");
}

}  // namespace ctxkern
