#pragma once

#include <cstdint>

namespace ctxkern {

using Work = void (*)(void* context, int64_t item, int thread);

// work(context, i, thread) for every i < items, on up to `threads` threads (0 <= thread < threads), each item once, in any
// order. One thread inside another parallel region, and in a child of a process that had a pool (its threads are gone).
void parallel_for(int threads, int64_t items, Work work, void* context);

// How many of `threads` a call with so many operations is worth: below kWorkOfAThread each, waking one costs more than it
// does (bench/LOG.md). A backward has three times the operations of its forward.
constexpr double kWorkOfAThread = 0.5e6;

constexpr int64_t threads_worth(double forward, bool backward, int64_t threads) {
  const double most = forward * (backward ? 3 : 1) / kWorkOfAThread;
  if (most >= static_cast<double>(threads)) return threads;
  return most < 1 ? 1 : static_cast<int64_t>(most);
}

}  // namespace ctxkern
