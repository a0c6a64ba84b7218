// The modulated operators, as ctxkern/modulated/cuda.py calls them.

#include "../../problem_checks.h"
#include "../runtime/library.h"
#include "schedule.h"

namespace ctxkern {
namespace {

template <class C, class P, int planes, int exact>
void run(Launcher& launch, Call& q, bool backward) {
  Modulated<C, P, planes, exact> modulated(launch, q);
  if (backward) {
    modulated.backward();
  } else {
    modulated.forward();
  }
}

// Whether parameters are wider than x.
bool wide(const Problem& q) {
  bool found = q.context.dtype != q.x.dtype;
  for (int64_t i = 0; i < q.projections; ++i) found = found || q.projection[i].bilinear.dtype != q.x.dtype;
  return found;
}

void check_sizes(const Problem& q) {
  for (const int64_t size : {q.batch.tokens, q.d_in, q.context_dim, q.batch.table, q.batch.sequences})
    if (size > kMost) throw std::runtime_error("a size is over 2^31 - 1");
  for (int64_t i = 0; i < q.projections; ++i)
    if (q.projection[i].d_out > kMost) throw std::runtime_error("a size is over 2^31 - 1");
}

}  // namespace
}  // namespace ctxkern

// {whether outer runs, most contexts, rows of D, columns of E, contexts of a block} of the first projection.
CTXKERN_EXPORT void ctxkern_cuda_modulated_tiles(const ctxkern::Problem* problem, int backward, int64_t* tiles) {
  using namespace ctxkern;
  const Problem& q = *problem;
  const int64_t d_out = q.projection[0].d_out, limit = most_contexts(q), element = size_of(q.x.dtype);
  const Blocks blocks = q.d_in == 0 ? Blocks{0, d_out, limit}
                        : backward  ? backward_blocks(q.d_in, d_out, q.context_dim, limit, element, q.workspace_bytes)
                                    : forward_blocks(q.d_in, d_out, limit, element, q.workspace_bytes);
  tiles[0] = outer(q);
  tiles[1] = limit;
  tiles[2] = blocks.rows;
  tiles[3] = blocks.columns;
  tiles[4] = blocks.group;
}

// Returns null, or what went wrong. Without a workspace nothing is launched, and *bytes is what it must hold.
CTXKERN_EXPORT const char* ctxkern_cuda_modulated(const ctxkern::Problem* problem, int backward, int device,
                                                  void* workspace, int64_t* bytes, void* stream) {
  using namespace ctxkern;
  return failure_of([&] {
    check_problem(*problem, backward);
    check_sizes(*problem);
    Call q{};
    static_cast<Problem&>(q) = *problem;
    Launcher launch(static_cast<char*>(workspace), static_cast<Stream>(stream));
    if (workspace) use_device(device);
    switch (q.x.dtype) {
      case Dtype::f32: run<float, float, 1, 1>(launch, q, backward); break;
      case Dtype::bf16:
        wide(q) ? run<Bfloat, Bfloat, 2, 3>(launch, q, backward) : run<Bfloat, Bfloat, 1, 1>(launch, q, backward);
        break;
      case Dtype::f16:
        wide(q) ? run<Half, float, 2, 2>(launch, q, backward) : run<Half, Half, 1, 1>(launch, q, backward);
        break;
    }
    *bytes = launch.bytes();
  });
}
