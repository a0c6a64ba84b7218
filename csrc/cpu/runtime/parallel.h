// The loop that kernels share their work by.
#pragma once

#include <type_traits>

#include "threads.h"
#include "vec.h"

namespace ctxkern {
namespace {

// parallel_for over body(item, thread), with what words W need around each item.
template <class W, class F>
inline void parallel(int64_t threads, int64_t items, F&& body) {
  const Work work = [](void* f, int64_t i, int thread) {
    W::enter();
    (*static_cast<std::remove_reference_t<F>*>(f))(i, thread);
    W::leave();
    stream_fence();
  };
  parallel_for(static_cast<int>(threads), items, work, &body);
}

}  // namespace
}  // namespace ctxkern
