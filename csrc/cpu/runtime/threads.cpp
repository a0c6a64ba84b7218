#include "threads.h"

#include <atomic>

#if defined(CTXKERN_STD_THREADS)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace ctxkern {
namespace {

std::atomic<bool> pool_lost{false};

#if defined(_OPENMP) && !defined(CTXKERN_STD_THREADS) && (defined(__unix__) || defined(__APPLE__))
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { pool_lost = true; });
#endif

bool alone(int threads, int64_t items) {
#if defined(CTXKERN_STD_THREADS)
  return threads <= 1 || items <= 1;
#elif defined(_OPENMP)
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
  if (threads > items) threads = static_cast<int>(items);
  std::atomic<int64_t> next{0};
#if defined(CTXKERN_STD_THREADS)
  // what the thread sanitizer sees through, as it does not through OpenMP
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      for (int64_t i; (i = next.fetch_add(1)) < items;) work(context, i, thread);
    });
  }
  for (std::thread& each : pool) each.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(context, i, thread);
  }
#endif
}

}  // namespace ctxkern
