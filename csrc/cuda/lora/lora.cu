// The low-rank operators, as ctxkern/lora/cuda.py calls them.

#include <limits>

#include "../../problem_checks.h"
#include "../runtime/library.h"
#include "schedule.h"

namespace ctxkern {
namespace {

template <class C, class P, class S>
void run(Launcher& launch, LoraCall& q, bool backward) {
  Lora<C, P, S> lora(launch, q);
  if (backward) {
    lora.backward();
  } else {
    lora.forward();
  }
}

void check_sizes(const LoraProblem& q) {
  for (const int64_t size : {q.batch.tokens, q.d_in, q.d_out, q.rank, q.batch.table, q.batch.sequences})
    if (size > std::numeric_limits<int>::max()) throw std::runtime_error("a size is over 2^31 - 1");
}

}  // namespace
}  // namespace ctxkern

// Returns null, or what went wrong. Without a workspace nothing is launched, and *bytes is what it must hold.
CTXKERN_EXPORT const char* ctxkern_cuda_lora(const ctxkern::LoraProblem* problem, int backward, int device,
                                             void* workspace, int64_t* bytes, void* stream) {
  using namespace ctxkern;
  return failure_of([&] {
    check_problem(*problem, backward);
    check_sizes(*problem);
    LoraCall q{};
    static_cast<LoraProblem&>(q) = *problem;
    q.scale /= 1 - static_cast<double>(q.kept_from) * 0x1p-32;
    Launcher launch(static_cast<char*>(workspace), static_cast<Stream>(stream));
    if (workspace) use_device(device);
    const bool wide = q.A.dtype != q.x.dtype || q.B.dtype != q.x.dtype;
    switch (q.x.dtype) {
      case Dtype::f32: run<float, float, float>(launch, q, backward); break;
      case Dtype::bf16: run<Bfloat, Bfloat, Bfloat>(launch, q, backward); break;
      case Dtype::f16:
        wide ? run<Half, float, float>(launch, q, backward) : run<Half, Half, float>(launch, q, backward);
    }
    *bytes = launch.bytes();
  });
}
