// What the kernels of the CPU take: the problem, its rows by context, and how a call is cut.
#pragma once

#include "../../problem.h"
#include "../runtime/rows.h"

namespace ctxkern {

struct Call : Problem {
  const Rows* rows;
  bool outer;
};

// Tiles that a call would use, and the memory that it needs in addition to its operands.
struct Tiles {
  int64_t strip, across, group;  // columns of E or rows of D, the other side, contexts at a time
  int64_t threads, ranges;       // ranges: parts of D whose sums for dcontext are kept apart
  int64_t weights_bytes;         // of `bytes`, those for weights and gradients of weights
  int64_t bytes;
};

// The entry points of one instruction set.
struct Kernels {
  Tiles (*tiles)(const Call&, bool backward);
  void (*forward)(const Call&, const Tiles&, char* workspace);
  void (*backward)(const Call&, const Tiles&, char* workspace);
};

}  // namespace ctxkern
