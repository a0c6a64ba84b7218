// Memory that is asked for before it is read.
#pragma once

#include "vec.h"

namespace ctxkern {
namespace {

// Memory to bring near while products run, two lines a step: more at once would fill the first cache's buffers of
// outstanding misses. What is asked for into the second leaves those free, and memory then brings twice as much.
struct Ahead {
  const char* from[2] = {nullptr, nullptr};
  int64_t bytes = 0;  // of each
  int64_t at = 0;
  int64_t far = 0;   // bytes from there to what follows it
  int64_t each = 0;  // lines of each that a block which is turned asks for

  // Products will ask for `lines` lines of each; blocks that are turned before them share the others.
  void share(int64_t lines, int64_t blocks) {
    const int64_t left = (bytes + 63) / 64 - lines;
    each = left > 0 && blocks > 0 ? (left + blocks - 1) / blocks : 0;
  }

  // Into the first cache, and what follows into the second.
  CTXKERN_INLINE void fetch() {
    if (at >= bytes) return;
    for (const char* const p : from) {
      __builtin_prefetch(p + at, 0, 3);
      __builtin_prefetch(p + at + far, 0, 2);
    }
    at += 64;
  }

  // What follows into the second alone, as much as eight steps bring.
  CTXKERN_INLINE void fetch_eight() {
    if (at >= bytes) return;
    for (const char* const p : from) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) __builtin_prefetch(p + at + i * 64 + far, 0, 2);
    }
    at += 8 * 64;
  }

  // Into the second alone.
  CTXKERN_INLINE void fetch_second() {
    if (at >= bytes) return;
    for (const char* const p : from) __builtin_prefetch(p + at, 0, 2);
    at += 64;
  }
};

}  // namespace
}  // namespace ctxkern
