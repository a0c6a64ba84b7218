#pragma once

#include <cstdint>

namespace ctxkern {

using Work = void (*)(void* context, int64_t item, int thread);

// work(context, i, thread) for every i < items, on up to `threads` threads (0 <= thread < threads), each item once, in any
// order. One thread inside another parallel region, and in a child of a process that had a pool (its threads are gone).
void parallel_for(int threads, int64_t items, Work work, void* context);

}  // namespace ctxkern
