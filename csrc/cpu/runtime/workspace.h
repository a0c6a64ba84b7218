// The temporary memory of a call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "memory.h"

namespace ctxkern {

// `bytes` of memory, aligned to 64; allocate(bytes) gives a tensor of bytes. Made and dropped with the GIL.
class Workspace {
 public:
  Workspace(int64_t bytes, const pybind11::object& allocate) : bytes_(bytes) {
    // below a megabyte asking Python for memory costs more than the memory
    constexpr int64_t kOwn = 1 << 20;
    if (bytes < kOwn) {
      own_.reset(new char[static_cast<size_t>(bytes + 64)]);
      data = own_.get();
    } else {
      block_ = allocate(bytes + 64);
      data = reinterpret_cast<char*>(pybind11::cast<uintptr_t>(block_.attr("data_ptr")()));
    }
    data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(data) + 63) / 64 * 64);
  }
  Workspace(const Workspace&) = delete;

  void advise() const { advise_huge(data, bytes_); }

  char* data;

 private:
  int64_t bytes_;
  std::unique_ptr<char[]> own_;
  pybind11::object block_;
};

}  // namespace ctxkern
