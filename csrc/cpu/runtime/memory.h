#pragma once

#include <cstdint>

namespace ctxkern {

// Asks for huge pages where `bytes` of memory at p are large and not yet touched: what is written first by a kernel then
// costs one fault for 2 MiB and not 512. Does nothing where the system has none.
void advise_huge(void* p, int64_t bytes);

// Memory for a large result, from a boundary of huge pages. New memory costs about as much as filling it, as the system
// clears it first, and a training step asks for the same gradients again: what is given back waits for the next of its
// size, until another size is asked for or kept_seconds pass, and at most kMostKept in all. Made and dropped with the GIL.
class LargeMemory {
 public:
  explicit LargeMemory(int64_t bytes);
  ~LargeMemory();
  LargeMemory(const LargeMemory&) = delete;
  LargeMemory& operator=(const LargeMemory&) = delete;

  char* data;
  int64_t bytes;
};

constexpr int64_t kMostKept = int64_t{1} << 30;

// How long memory waits, 10 s unless CTXKERN_KEPT_SECONDS says otherwise; 0: not at all.
double kept_seconds();

// Bytes that wait.
int64_t kept_bytes();

// Gives back to the system what has waited for longer than `seconds`; with 0, all.
void release_kept(double seconds);

}  // namespace ctxkern
