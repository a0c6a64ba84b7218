// What the kernels take by value, and what they ask of it.
#pragma once

#include "../../problem.h"
#include "../runtime/groups.h"

namespace ctxkern {

// `scale` makes up for what dropout takes away. h, g: [N, R], grouped rows of h and g in the dtype of their products;
// null where not asked for.
struct LoraCall : LoraProblem {
  Groups groups;
  char *h, *g;
};

struct Adapter {
  int64_t slot;
  int rank;
  float scale;
};

__device__ __forceinline__ Adapter adapter_of(const LoraCall& q, int u) {
  const int64_t slot = slot_of(q.groups, u), rank = q.ranks ? q.ranks[slot] : q.rank;
  require(rank >= 0 && rank <= q.rank);
  const double scale = q.scales ? q.scale * q.scales[slot] : q.scale;
  return {slot, static_cast<int>(rank), static_cast<float>(scale)};
}

// Rows of a tile, all of one adapter: `count` grouped rows from `first` on.
struct Lines {
  const int* order;
  int first, count;

  __device__ __forceinline__ int64_t row(int i) const { return row_of(order, first + i); }
};

}  // namespace ctxkern
