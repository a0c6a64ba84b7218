#include <pybind11/pybind11.h>

#include <vector>

#include "../../problem_checks.h"
#include "../runtime/memory.h"
#include "../runtime/module.h"
#include "../runtime/workspace.h"
#include "lora.h"

namespace py = pybind11;

namespace ctxkern {
namespace {

// Operations below which waking a second thread costs more than it does (bench/LOG.md).
constexpr double kWorkOfAThread = 0.75e6;

int64_t threads_for(const LoraCall& q) {
  const double most = 2.0 * q.rows_of->count * q.rank * static_cast<double>(q.d_in + q.d_out) / kWorkOfAThread;
  if (most < static_cast<double>(q.threads)) return most < 1 ? 1 : static_cast<int64_t>(most);
  return q.threads;
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
    call.threads = threads_for(call);
  }
  Made(const Made&) = delete;

  GroupedRows grouped;
  Rows rows;
  std::vector<LoraBlock> blocks;
  std::vector<int64_t> first;
  LoraCall call;
};

void lora(uintptr_t address, bool backward, const py::object& allocate) {
  const LoraProblem& problem = *reinterpret_cast<const LoraProblem*>(address);
  check_problem(problem, backward);
  check_ranks(problem);
  release_kept(kept_seconds());
  const Made made(problem);
  const LoraKernels& run = lora_kernels_for(chosen_isa(), problem.x.dtype);
  const Workspace workspace(run.bytes(made.call, backward), allocate);
  py::gil_scoped_release unlocked;
  workspace.advise();
  (backward ? run.backward : run.forward)(made.call, workspace.data);
}

}  // namespace

void bind_lora(py::module_& m) {
  m.def("lora", &lora,
        "Adds the low-rank update of the problem at an address; allocate(bytes) gives a tensor of bytes.");
}

}  // namespace ctxkern
