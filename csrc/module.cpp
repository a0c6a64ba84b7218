#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/modulated.h"

namespace py = pybind11;

namespace {

using ctxkern::Dtype;
// What outer costs a row, panel a context, and outer beyond that: see plan.py.
using Terms = std::tuple<double, double, double>;

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

// The integers of a Python tuple, one after another.
class Reader {
 public:
  explicit Reader(const py::tuple& values) : values_(values) {}

  int64_t number() {
    const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(values_.ptr(), at_++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  char* pointer() { return reinterpret_cast<char*>(number()); }
  Dtype dtype() { return static_cast<Dtype>(number()); }
  ctxkern::Matrix matrix() { return {pointer(), dtype(), number(), number()}; }
  ctxkern::Bilinear bilinear() { return {pointer(), dtype(), number(), number(), number()}; }

  void expect(Py_ssize_t count) const {
    if (PyTuple_GET_SIZE(values_.ptr()) != count) throw std::invalid_argument("a tuple of another length");
  }

 private:
  const py::tuple& values_;
  Py_ssize_t at_ = 0;
};

struct Call {
  ctxkern::GroupedRows grouped;
  ctxkern::Rows rows;
  ctxkern::Problem problem;
};

// Operations below which waking a second thread costs more than it does (bench/LOG.md).
constexpr double kWorkOfAThread = 0.75e6;

int threads_for(const ctxkern::Problem& q) {
  double columns = 0;
  for (int i = 0; i < q.projections; ++i) columns += static_cast<double>(q.projection[i].d_out);
  const double rows = static_cast<double>(q.tokens + q.rows->contexts * q.context_dim) * (q.outer ? q.context_dim : 1);
  const double most = 2 * rows * static_cast<double>(q.d_in) * columns / kWorkOfAThread;
  return most < q.threads ? (most < 1 ? 1 : static_cast<int>(most)) : q.threads;
}

// See modulated/cpu.py, which builds the tuples.
void read(Call& call, const py::tuple& sizes, const py::tuple& projections, double outer_above) {
  Reader in(sizes);
  in.expect(18);
  ctxkern::Problem& q = call.problem;
  q.tokens = in.number();
  q.d_in = in.number();
  q.context_dim = in.number();
  q.table = in.number();
  q.dtype = in.dtype();
  q.x = in.pointer();
  q.context = in.matrix();
  q.dx = in.pointer();
  q.dcontext = in.pointer();
  q.threads = static_cast<int>(in.number());
  q.budget = in.number();
  const int64_t sequences = in.number(), length = in.number();
  const auto* const bounds = reinterpret_cast<const int32_t*>(in.pointer());
  const auto* const index = reinterpret_cast<const int64_t*>(in.pointer());
  call.grouped = ctxkern::group_rows(sequences, length, q.tokens, bounds, index, q.table);
  call.rows = call.grouped.view();
  q.rows = &call.rows;
  q.outer = static_cast<double>(call.rows.contexts) > outer_above;
  q.projections = static_cast<int>(projections.size());
  if (q.projections > ctxkern::kMaxProjections) throw std::invalid_argument("too many projections");
  for (int i = 0; i < q.projections; ++i) {
    const py::tuple each = projections[i];
    Reader one(each);
    one.expect(22);
    ctxkern::Projection& p = q.projection[i];
    p.d_out = one.number();
    p.weight = one.matrix();
    p.bilinear = one.bilinear();
    p.bias = one.pointer();
    p.bias_dtype = one.dtype();
    char* const rows = one.pointer();
    p.y = rows;
    p.dy = rows;
    p.dweight = one.matrix();
    p.dbilinear = one.bilinear();
  }
  q.threads = threads_for(q);
}

const ctxkern::Kernels& kernels(const ctxkern::Problem& q) {
  return ctxkern::kernels_for(ctxkern::chosen_isa(), q.dtype);
}

void advise(const ctxkern::Problem& q, bool backward) {
  const int64_t size = ctxkern::size_of(q.dtype);
  if (backward) ctxkern::advise_huge(q.dx, q.tokens * q.d_in * size);
  for (int i = 0; i < q.projections; ++i) {
    const ctxkern::Projection& p = q.projection[i];
    if (!backward) ctxkern::advise_huge(p.y, q.tokens * p.d_out * size);
    ctxkern::advise_huge(p.dbilinear.data, q.d_in * p.d_out * q.context_dim * ctxkern::size_of(p.dbilinear.dtype));
  }
}

void modulated(const py::tuple& sizes, const py::tuple& projections, bool backward, double outer_above,
               const py::object& allocate) {
  Call call;
  read(call, sizes, projections, outer_above);
  const ctxkern::Kernels& run = kernels(call.problem);
  const ctxkern::Tiles tiles = run.tiles(call.problem, backward);
  // below a megabyte asking Python for memory costs more than the memory
  constexpr int64_t kOwn = 1 << 20;
  std::unique_ptr<char[]> own;
  if (tiles.bytes < kOwn) own.reset(new char[static_cast<size_t>(tiles.bytes + 64)]);
  char* const workspace = own ? own.get() : reinterpret_cast<char*>(py::cast<uintptr_t>(allocate(tiles.bytes + 64)));
  auto* const aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64);
  py::gil_scoped_release unlocked;
  advise(call.problem, backward);
  ctxkern::advise_huge(workspace, tiles.bytes);
  (backward ? run.backward : run.forward)(call.problem, tiles, aligned);
}

py::dict modulated_tiles(const py::tuple& sizes, const py::tuple& projections, bool backward, double outer_above) {
  Call call;
  read(call, sizes, projections, outer_above);
  const ctxkern::Tiles tiles = kernels(call.problem).tiles(call.problem, backward);
  py::dict made;
  made["outer"] = call.problem.outer;
  made["contexts"] = call.rows.contexts;
  made["strip"] = tiles.strip;
  made["group"] = tiles.group;
  made["threads"] = tiles.threads;
  made["weights_bytes"] = tiles.weights_bytes;
  made["bytes"] = tiles.bytes;
  return made;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of ctxkern.";
  m.def("cpu_isas", &cpu_isas, "The instruction sets that this build has code for and this machine runs, best last.");
  m.def("cpu_isa", [] { return ctxkern::isa_name(ctxkern::chosen_isa()); },
        "The instruction set in use: the best, or the one named by CTXKERN_CPU_ISA.");
  m.def("force_cpu_isa", &force_cpu_isa, "Makes one of cpu_isas() the instruction set in use, for tests; returns the one before.");
  m.def("cpu_name", &ctxkern::cpu_name, "The brand string of the processor, or an empty string.");
  m.def("modulated", &modulated, "Runs modulated projections forward or backward; see modulated/cpu.py.");
  m.def("modulated_tiles", &modulated_tiles, "How `modulated` would run the same arguments.");
}
