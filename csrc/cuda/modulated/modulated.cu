// The modulated operators, as ctxkern/_cuda.py calls them.

#include <string>

#include "schedule.h"

namespace ctxkern {
namespace {

template <class C, int planes, int exact>
void run(Launcher& launch, Problem& q, bool backward) {
  Modulated<C, planes, exact> modulated(launch, q);
  if (backward) {
    modulated.backward();
  } else {
    modulated.forward();
  }
}

enum Dtype { kFloat, kBfloat, kHalf };

thread_local std::string failure;

}  // namespace
}  // namespace ctxkern

#define CTXKERN_EXPORT extern "C" __attribute__((visibility("default")))

// What changes the layout of Problem or what is exported changes this.
CTXKERN_EXPORT int ctxkern_cuda_abi() { return 3; }
CTXKERN_EXPORT int ctxkern_cuda_emulated() {
#ifdef CTXKERN_EMULATE
  return 1;
#else
  return 0;
#endif
}
CTXKERN_EXPORT int64_t ctxkern_cuda_problem_bytes() { return sizeof(ctxkern::Problem); }

// Null where kernels can run on the device, or why not: its driver, or no code for it.
CTXKERN_EXPORT const char* ctxkern_cuda_unusable([[maybe_unused]] int device) {
  using namespace ctxkern;
#ifndef CTXKERN_EMULATE
  try {
    int before = 0;
    Launcher::check(cudaGetDevice(&before), "device");
    Launcher::check(cudaSetDevice(device), "device");
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, outer_sum_kernel<float>);
    Launcher::check(cudaSetDevice(before), "device");
    Launcher::check(status, "kernels");
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
#endif
  return nullptr;
}

// {rows, columns, group} of {d_in, d_out, context_dim, contexts, bytes of an element, workspace}.
CTXKERN_EXPORT void ctxkern_cuda_blocks(const int64_t* sizes, int backward, int64_t* cut) {
  using namespace ctxkern;
  const Blocks blocks = sizes[0] == 0 ? Blocks{0, sizes[1], sizes[3]}
                        : backward    ? backward_blocks(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5])
                                      : forward_blocks(sizes[0], sizes[1], sizes[3], sizes[4], sizes[5]);
  cut[0] = blocks.rows;
  cut[1] = blocks.columns;
  cut[2] = blocks.group;
}

// Returns null, or what went wrong. Without a workspace nothing is launched, and *bytes is what it must hold.
CTXKERN_EXPORT const char* ctxkern_cuda_modulated(const ctxkern::Problem* problem, int backward, [[maybe_unused]] int device,
                                                  void* workspace, int64_t* bytes, void* stream) {
  using namespace ctxkern;
  try {
    Problem q = *problem;
    Launcher launch(static_cast<char*>(workspace), static_cast<Stream>(stream));
#ifndef CTXKERN_EMULATE
    if (workspace) Launcher::check(cudaSetDevice(device), "device");
#endif
    for (const int64_t size : {q.tokens, q.d_in, q.context_dim, q.table, q.sequences})
      if (size > kMost) throw std::runtime_error("a size is over 2^31 - 1");
    bool wide = q.context.wide != 0;
    for (int i = 0; i < q.projections; ++i) {
      if (q.projection[i].d_out > kMost) throw std::runtime_error("a size is over 2^31 - 1");
      wide = wide || q.projection[i].bilinear.wide;
    }
    switch (q.dtype) {
      case kFloat:
        run<float, 1, 1>(launch, q, backward);
        break;
      case kBfloat:
        wide ? run<Bfloat, 2, 3>(launch, q, backward) : run<Bfloat, 1, 1>(launch, q, backward);
        break;
      case kHalf:
        wide ? run<Half, 2, 2>(launch, q, backward) : run<Half, 1, 1>(launch, q, backward);
        break;
      default:
        throw std::runtime_error("an unknown dtype");
    }
    *bytes = launch.bytes();
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}
