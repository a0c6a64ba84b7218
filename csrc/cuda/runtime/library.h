// What the entry points of the library share.
#pragma once

#include <exception>
#include <string>

#include "launch.h"

#define CTXKERN_EXPORT extern "C" __attribute__((visibility("default")))

namespace ctxkern {

// Null, or what f threw, which stays until this thread's next failure.
template <class F>
const char* failure_of(F f) {
  thread_local std::string failure;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}

inline void use_device([[maybe_unused]] int device) {
#ifndef CTXKERN_EMULATE
  Launcher::check(cudaSetDevice(device), "device");
#endif
}

}  // namespace ctxkern
