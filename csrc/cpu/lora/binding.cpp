#include <pybind11/pybind11.h>

#include <vector>

#include "../../problem_checks.h"
#include "../runtime/memory.h"
#include "../runtime/module.h"
#include "../runtime/tensors.h"
#include "../runtime/workspace.h"
#include "lora.h"

namespace py = pybind11;

namespace ctxkern {
namespace {

// Operations below which waking a second thread costs more than it does (bench/LOG.md).
constexpr double kWorkOfAThread = 0.5e6;

int64_t threads_for(const LoraCall& q, bool backward) {
  const double work = 2.0 * q.rows_of->count * q.rank * static_cast<double>(q.d_in + q.d_out) * (backward ? 3 : 1);
  const double most = work / kWorkOfAThread;
  if (most < static_cast<double>(q.threads)) return most < 1 ? 1 : static_cast<int64_t>(most);
  return q.threads;
}

// A call, and what it looks at.
struct Made {
  Made(const LoraProblem& problem, bool backward) {
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
    call.threads = threads_for(call, backward);
  }
  Made(const Made&) = delete;

  GroupedRows grouped;
  Rows rows;
  std::vector<LoraBlock> blocks;
  std::vector<int64_t> first;
  LoraCall call;
};

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
    const Tensor values = tensor_of(entry(gates, 0, 3), 2);
    q.gates = reinterpret_cast<const float*>(values.data);
    q.gate_rows = values.sizes[0];
    q.gate_of = longs_of(entry(gates, 1, 3));
    q.products = reinterpret_cast<float*>(address_of(entry(gates, 2, 3)));
  }
  return q;
}

void lora(py::handle operands, py::handle rows, py::handle gradients, py::handle gates, bool adds, double scale,
          int64_t kept_from, int64_t threads, const py::object& allocate) {
  const bool backward = !gradients.is_none();
  const LoraProblem problem = problem_of(operands, rows, gradients, gates, adds, scale, kept_from, threads);
  check_problem(problem, backward);
  check_ranks(problem);
  release_kept(kept_seconds());
  const Made made(problem, backward);
  const LoraKernels& run = lora_kernels_for(chosen_isa(), problem.x.dtype);
  const Workspace workspace(run.bytes(made.call, backward), allocate);
  py::gil_scoped_release unlocked;
  workspace.advise();
  (backward ? run.backward : run.forward)(made.call, workspace.data);
}

// At the address of a struct of runtime/problem.py, for libraries without Python.
void fill_lora(uintptr_t address, py::handle operands, py::handle rows, py::handle gradients, py::handle gates,
               bool adds, double scale, int64_t kept_from) {
  *reinterpret_cast<LoraProblem*>(address) = problem_of(operands, rows, gradients, gates, adds, scale, kept_from, 1);
}

}  // namespace

void bind_lora(py::module_& m) {
  m.def("lora", &lora,
        "Runs the update: (operands, rows, (dx, dA, dB) or None, gates or None, adds, scale, kept_from, threads, "
        "allocate); allocate(bytes) gives a tensor of bytes.");
  m.def("fill_lora", &fill_lora, "Fills the struct at an address with the same.");
}

}  // namespace ctxkern
