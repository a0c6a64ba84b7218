// What ctxkern/runtime/cuda.py asks of the library before any family's kernels are called.

#include "library.h"

#include "../../problem_checks.h"

namespace ctxkern {
namespace {

#ifndef CTXKERN_EMULATE
__global__ void probe_kernel() {}
#endif

}  // namespace
}  // namespace ctxkern

// What changes what is exported changes this.
CTXKERN_EXPORT int ctxkern_cuda_abi() { return 5; }

// Where the fields of problems lie; runtime/problem.py must agree.
CTXKERN_EXPORT const char* ctxkern_cuda_problem_layout() {
  static const std::string layout = ctxkern::problem_layout();
  return layout.c_str();
}

CTXKERN_EXPORT int ctxkern_cuda_emulated() {
#ifdef CTXKERN_EMULATE
  return 1;
#else
  return 0;
#endif
}

// Null where kernels can run on the device, or why not: its driver, or no code for it. The current device stays.
CTXKERN_EXPORT const char* ctxkern_cuda_unusable([[maybe_unused]] int device) {
  return ctxkern::failure_of([&] {
#ifndef CTXKERN_EMULATE
    using ctxkern::Launcher;
    int before = 0;
    Launcher::check(cudaGetDevice(&before), "device");
    Launcher::check(cudaSetDevice(device), "device");
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, ctxkern::probe_kernel);
    Launcher::check(cudaSetDevice(before), "device");
    Launcher::check(status, "kernels");
#endif
  });
}
