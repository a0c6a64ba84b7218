// Launches, and the workspace that they share.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"

#ifndef CTXKERN_EMULATE
namespace ctxkern {
using Stream = cudaStream_t;
}
#else
namespace ctxkern {
using Stream = void*;
}
#endif

namespace ctxkern {

inline int64_t ceil_div(int64_t size, int64_t step) { return (size + step - 1) / step; }

// Counts what a call needs in a first pass, where nothing is launched, and hands it out in a second.
class Launcher {
 public:
  Launcher(char* workspace, Stream stream) : workspace_(workspace), stream_(stream) {}

  bool counts() const { return workspace_ == nullptr; }
  int64_t bytes() const { return used_; }

  template <class T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return counts() ? nullptr : reinterpret_cast<T*>(workspace_ + at);
  }

  void zero(void* at, int64_t bytes) {
    if (counts() || bytes == 0) return;
#ifdef CTXKERN_EMULATE
    std::memset(at, 0, static_cast<size_t>(bytes));
#else
    check(cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream_), "memset");
#endif
  }

  template <class... Parameters, class... Arguments>
  void operator()(const char* name, void (*kernel)(Parameters...), int64_t x, int64_t y, int64_t z, int threads,
                  size_t shared, const Arguments&... arguments) {
    if (counts() || x == 0 || y == 0 || z == 0) return;
    if (x > 0x7fffffff || y > 65535 || z > 65535) throw std::runtime_error(std::string(name) + ": too many blocks");
    const dim3 grid{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
#ifdef CTXKERN_EMULATE
    try {
      emulated::launch(kernel, grid, static_cast<unsigned>(threads), shared, static_cast<Parameters>(arguments)...);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(name) + ": " + error.what());
    }
#else
    if (shared > (48 << 10))
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
    kernel<<<grid, threads, shared, stream_>>>(static_cast<Parameters>(arguments)...);
    check(cudaGetLastError(), name);
#endif
  }

#ifndef CTXKERN_EMULATE
  static void check(cudaError_t status, const char* name) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next launch would find it
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
  }
#endif

 private:
  char* workspace_;
  Stream stream_;
  int64_t used_ = 0;
};

}  // namespace ctxkern
