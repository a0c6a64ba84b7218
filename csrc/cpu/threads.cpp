#include "threads.h"

#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace ctxkern {
namespace {

std::atomic<bool> pool_lost{false};

#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { pool_lost = true; });
#endif

bool alone(int threads, int64_t items) {
#if defined(_OPENMP)
  return threads <= 1 || items <= 1 || pool_lost.load(std::memory_order_relaxed) || omp_in_parallel();
#else
  return true;
#endif
}

}  // namespace

void parallel_for(int threads, int64_t items, Work work, void* context) {
  if (alone(threads, items)) {
    for (int64_t i = 0; i < items; ++i) work(context, i, 0);
    return;
  }
#if defined(_OPENMP)
  if (threads > items) threads = static_cast<int>(items);
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(context, i, thread);
  }
#endif
}

}  // namespace ctxkern
