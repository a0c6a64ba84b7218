// What the kernels of the CPU take: the problem, its rows by adapter, and how a call is cut.
#pragma once

#include "../../problem.h"
#include "../runtime/rows.h"

namespace ctxkern {

// Grouped rows `first` and on, all of one adapter.
struct LoraBlock {
  int64_t adapter, first, count;
  int64_t row;         // row of x of the first, where they lie together
  const int64_t* map;  // row of x of each, where not
};

struct LoraCall : LoraProblem {
  const Rows* rows_of;
  const LoraBlock* blocks;
  const int64_t* block_first;  // [U + 1]

  int64_t adapters() const { return rows_of->contexts; }
  int64_t block_count() const { return block_first[adapters()]; }
  int64_t slot(int64_t u) const { return rows_of->slot[u]; }
  int64_t rank_of(int64_t u) const { return ranks ? ranks[slot(u)] : rank; }
};

// Rows of a block, at most: sums over rows are cut into as many.
constexpr int64_t kBlockRows = 256;

// The entry points of one instruction set.
struct LoraKernels {
  int64_t (*bytes)(const LoraCall&, bool backward);  // of workspace
  void (*forward)(const LoraCall&, char* workspace);
  void (*backward)(const LoraCall&, char* workspace);
};

}  // namespace ctxkern
