#include <pybind11/pybind11.h>

#include <string>

#include "../../problem_checks.h"
#include "../runtime/memory.h"
#include "../runtime/module.h"
#include "../runtime/workspace.h"
#include "modulated.h"

namespace py = pybind11;

namespace ctxkern {
namespace {

// Operations below which waking a second thread costs more than it does (bench/LOG.md).
constexpr double kWorkOfAThread = 0.75e6;

int64_t threads_for(const Call& q) {
  double columns = 0;
  for (int i = 0; i < q.projections; ++i) columns += static_cast<double>(q.projection[i].d_out);
  const double rows = static_cast<double>(q.batch.tokens + q.rows->contexts * q.context_dim) *
                      static_cast<double>(q.outer ? q.context_dim : 1);
  const double most = 2 * rows * static_cast<double>(q.d_in) * columns / kWorkOfAThread;
  if (most < static_cast<double>(q.threads)) return most < 1 ? 1 : static_cast<int64_t>(most);
  return q.threads;
}

// The problem (runtime/problem.py) at an address.
const Problem& problem_at(uintptr_t address) { return *reinterpret_cast<const Problem*>(address); }

// A call, and the rows that it looks at.
struct Made {
  explicit Made(const Problem& problem) {
    static_cast<Problem&>(call) = problem;
    const Batch& batch = call.batch;
    grouped = group_rows(batch.sequences, batch.length, batch.tokens, batch.bounds, batch.index, batch.table);
    rows = grouped.view();
    call.rows = &rows;
    call.outer = static_cast<double>(rows.contexts) > call.outer_above;
    call.threads = threads_for(call);
  }
  Made(const Made&) = delete;

  GroupedRows grouped;
  Rows rows;
  Call call;
};

const Kernels& kernels(const Call& q) { return kernels_for(chosen_isa(), q.x.dtype); }

void advise(const Call& q, bool backward) {
  const int64_t size = size_of(q.x.dtype);
  if (backward) advise_huge(q.dx, q.batch.tokens * q.d_in * size);
  for (int i = 0; i < q.projections; ++i) {
    const Projection& p = q.projection[i];
    if (!backward) advise_huge(p.rows, q.batch.tokens * p.d_out * size);
    advise_huge(p.dbilinear.data, q.d_in * p.d_out * q.context_dim * size_of(p.dbilinear.dtype));
  }
}

void modulated(uintptr_t problem, bool backward, const py::object& allocate) {
  check_problem(problem_at(problem), backward);
  release_kept(kept_seconds());
  const Made made(problem_at(problem));
  const Kernels& run = kernels(made.call);
  const Tiles tiles = run.tiles(made.call, backward);
  const Workspace workspace(tiles.bytes, allocate);
  py::gil_scoped_release unlocked;
  advise(made.call, backward);
  workspace.advise();
  (backward ? run.backward : run.forward)(made.call, tiles, workspace.data);
}

py::dict modulated_tiles(uintptr_t problem, bool backward) {
  const Made made(problem_at(problem));
  const Tiles tiles = kernels(made.call).tiles(made.call, backward);
  py::dict found;
  found["outer"] = made.call.outer;
  found["contexts"] = made.rows.contexts;
  found["strip"] = tiles.strip;
  found["group"] = tiles.group;
  found["workspace_bytes"] = tiles.weights_bytes;
  return found;
}

}  // namespace

void bind_modulated(py::module_& m) {
  m.def("problem_layout", &problem_layout, "Where the fields of a problem lie; runtime/problem.py must agree.");
  m.def("modulated", &modulated,
        "Runs modulated projections of the problem at an address; allocate(bytes) gives a tensor of bytes.");
  m.def("modulated_tiles", &modulated_tiles, "How `modulated` would run the same problem.");
}

}  // namespace ctxkern
