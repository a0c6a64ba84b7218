// Which rows of x belong to which context, found on the device: equal indices become one context, without waiting.
//
// Contexts in use are numbered 0 to U - 1 by their first sequence, and their rows brought together in an order of its
// own, the grouped rows; a tile is up to `block` grouped rows of one context. U is known on the device alone: `limit` and
// `tiles` are the most there can be. Without an index and without bounds every sequence is a context of `length` rows
// (`uniform`) and there is no buffer. It is int32, one part after another:
//
//   contexts, tiles          how many there are
//   slot [limit]             row of the context table
//   first [limit + 1]        first grouped row of a context
//   tile_first [limit + 1]   its first tile
//   tile_context [tiles]     context of a tile
//   order [N]                row of x of a grouped row; only with an index
//   seen [4, B]              scratch: first of the same index, rows of it before, rows of it in all; first grouped row
//
// Where an index may be −1, `optional`, sequences of that one belong to none: no tile has their rows.
#pragma once

#include <algorithm>

#include "../../problem.h"
#include "launch.h"

namespace ctxkern {

struct Groups {
  int* buffer;
  int limit, tiles, block, uniform, ordered;
};

struct Range {
  int begin, end;
};

__device__ __forceinline__ int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

__device__ __forceinline__ int context_count(const Groups& g) { return g.uniform ? g.limit : g.buffer[0]; }
__device__ __forceinline__ int tile_count(const Groups& g) { return g.uniform ? g.tiles : g.buffer[1]; }

__device__ __forceinline__ int slot_of(const Groups& g, int u) { return g.uniform ? u : g.buffer[2 + u]; }

__device__ __forceinline__ Range range_of(const Batch& batch, const Groups& g, int u) {
  if (g.uniform) return {static_cast<int>(u * batch.length), static_cast<int>((u + 1) * batch.length)};
  return {g.buffer[2 + g.limit + u], g.buffer[3 + g.limit + u]};
}

// Rows of x of grouped rows; null where they are the same.
__device__ __forceinline__ const int* order_of(const Groups& g) {
  return g.ordered ? g.buffer + 4 + 3 * g.limit + g.tiles : nullptr;
}

__device__ __forceinline__ int64_t row_of(const int* order, int64_t i) { return order ? order[i] : i; }

struct TileOfRows {
  int context, begin, end;
};

__device__ __forceinline__ TileOfRows tile_of(const Batch& batch, const Groups& g, int tile) {
  int u, inside;
  if (g.uniform) {
    const int each = static_cast<int>((batch.length + g.block - 1) / g.block);
    u = tile / each;
    inside = tile % each;
  } else {
    u = g.buffer[4 + 3 * g.limit + tile];
    inside = tile - g.buffer[3 + 2 * g.limit + u];
  }
  const Range range = range_of(batch, g, u);
  return {u, range.begin + inside * g.block, range.end};
}

// The rows of a sequence, cut to those that there are.
__device__ __forceinline__ Range sequence_of(const Batch& batch, int b) {
  if (!batch.bounds) return {static_cast<int>(b * batch.length), static_cast<int>((b + 1) * batch.length)};
  const int begin = batch.bounds[b] < 0 ? 0 : least(batch.bounds[b], batch.tokens);
  const int end = batch.bounds[b + 1] < begin ? begin : least(batch.bounds[b + 1], batch.tokens);
  return {begin, end};
}

// What torch's own indexing does where an index lies outside: the device stops.
__device__ __forceinline__ void require(bool holds) {
#ifdef CTXKERN_EMULATE
  if (!holds) throw std::runtime_error("an index or cu_seqlens lies outside");
#else
  if (!holds) __trap();
#endif
}

constexpr int kGroupThreads = 128;

static __global__ void seen_kernel(Batch batch, int* seen, bool optional) {
  const int b = blockIdx.x * blockDim.x + threadIdx.x, sequences = static_cast<int>(batch.sequences);
  if (b >= sequences) return;
  const int64_t mine = batch.index[b];
  require(mine >= (optional ? -1 : 0) && mine < batch.table);
  if (mine < 0) {
    seen[b] = -1;
    seen[2 * sequences + b] = 0;
    return;
  }
  int first = b, before = 0, total = 0;
  for (int j = 0; j < sequences; ++j) {
    if (batch.index[j] != mine) continue;
    const Range range = sequence_of(batch, j);
    first = j < first ? j : first;
    before += j < b ? range.end - range.begin : 0;
    total += range.end - range.begin;
  }
  seen[b] = first;
  seen[sequences + b] = before;
  seen[2 * sequences + b] = total;
}

constexpr size_t kNumberShared = 3 * kGroupThreads * sizeof(int);

// One block: contexts, rows and tiles summed over sequences, kGroupThreads of them at a time.
static __global__ void number_kernel(Batch batch, Groups g, int* seen) {
  const int sequences = static_cast<int>(batch.sequences), t = threadIdx.x;
  int* sums = reinterpret_cast<int*>(shared_memory());
  if (batch.bounds && t == 0) require(batch.bounds[0] == 0 && batch.bounds[sequences] == batch.tokens);
  int before[3] = {0, 0, 0};
  for (int start = 0; start < sequences; start += kGroupThreads) {
    const int b = start + t;
    int mine[3] = {0, 0, 0};
    if (b < sequences) {
      if (batch.bounds) require(batch.bounds[b] <= batch.bounds[b + 1]);
      const Range range = sequence_of(batch, b);
      const int total = batch.index ? seen[2 * sequences + b] : range.end - range.begin;
      if (total && (!batch.index || seen[b] == b)) {
        mine[0] = 1;
        mine[1] = total;
        mine[2] = (total + g.block - 1) / g.block;
      }
    }
  CTXKERN_UNROLL for (int i = 0; i < 3; ++i) sums[i * kGroupThreads + t] = mine[i];
    __syncthreads();
    for (int step = 1; step < kGroupThreads; step *= 2) {
      int more[3];
      CTXKERN_UNROLL for (int i = 0; i < 3; ++i) more[i] = t >= step ? sums[i * kGroupThreads + t - step] : 0;
      __syncthreads();
      CTXKERN_UNROLL for (int i = 0; i < 3; ++i) sums[i * kGroupThreads + t] += more[i];
      __syncthreads();
    }
    if (mine[0]) {
      int at[3];
      CTXKERN_UNROLL for (int i = 0; i < 3; ++i) at[i] = before[i] + sums[i * kGroupThreads + t] - mine[i];
      g.buffer[2 + at[0]] = batch.index ? static_cast<int>(batch.index[b]) : b;
      g.buffer[2 + g.limit + at[0]] = at[1];
      g.buffer[3 + 2 * g.limit + at[0]] = at[2];
      seen[3 * sequences + b] = at[1];
    }
    CTXKERN_UNROLL for (int i = 0; i < 3; ++i) before[i] += sums[(i + 1) * kGroupThreads - 1];
    __syncthreads();
  }
  if (t) return;
  g.buffer[0] = before[0];
  g.buffer[1] = before[2];
  g.buffer[2 + g.limit + before[0]] = before[1];
  g.buffer[3 + 2 * g.limit + before[0]] = before[2];
}

// One block per sequence: the tiles of a context, the order of a sequence's rows.
static __global__ void order_kernel(Batch batch, Groups g, const int* seen) {
  const int b = blockIdx.x, sequences = static_cast<int>(batch.sequences);
  if (b < g.buffer[0])
    for (int t = g.buffer[3 + 2 * g.limit + b] + threadIdx.x; t < g.buffer[4 + 2 * g.limit + b]; t += blockDim.x)
      g.buffer[4 + 3 * g.limit + t] = b;
  if (!batch.index) return;
  const Range range = sequence_of(batch, b);
  if (range.begin == range.end || seen[b] < 0) return;
  const int at = seen[3 * sequences + seen[b]] + seen[sequences + b];
  for (int i = threadIdx.x; i < range.end - range.begin; i += blockDim.x)
    g.buffer[4 + 3 * g.limit + g.tiles + at + i] = range.begin + i;
}

// One block per sequence: the row of the context table of each row of x.
static __global__ void slots_kernel(Batch batch, int* slots) {
  const int b = blockIdx.x;
  const int64_t slot = batch.index ? batch.index[b] : b;
  require(slot >= 0 && slot < batch.table);
  if (batch.bounds) require(batch.bounds[b] <= batch.bounds[b + 1] && batch.bounds[0] == 0 && batch.bounds[batch.sequences] == batch.tokens);
  const Range range = sequence_of(batch, b);
  for (int i = range.begin + threadIdx.x; i < range.end; i += blockDim.x) slots[i] = static_cast<int>(slot);
}

// Finds them in a buffer of the workspace; block: rows of a tile.
inline Groups group_rows(Launcher& launch, const Batch& batch, int block, bool optional = false) {
  const bool indexed = batch.index != nullptr;
  Groups g{nullptr, 0, 0, block, !indexed && !batch.bounds, indexed};
  if (g.uniform) {
    g.limit = static_cast<int>(batch.sequences);
    g.tiles = static_cast<int>(batch.sequences * ceil_div(batch.length, block));
    return g;
  }
  g.limit = static_cast<int>(std::min(batch.sequences, batch.table));
  g.tiles = static_cast<int>(batch.tokens / block + g.limit);
  g.buffer = launch.take<int>(4 + 3 * g.limit + g.tiles + (indexed ? batch.tokens : 0));
  int* seen = launch.take<int>(4 * batch.sequences);
  if (indexed)
    launch("seen", seen_kernel, ceil_div(batch.sequences, kGroupThreads), 1, 1, kGroupThreads, 0, batch, seen, optional);
  launch("number", number_kernel, 1, 1, 1, kGroupThreads, kNumberShared, batch, g, seen);
  launch("order", order_kernel, batch.sequences, 1, 1, kGroupThreads, 0, batch, g, seen);
  return g;
}

// The row of the table of each row of x; null where that is the row itself.
inline int* find_slots(Launcher& launch, const Batch& batch) {
  if (!batch.index && !batch.bounds && batch.length == 1) return nullptr;
  int* slots = launch.take<int>(batch.tokens);
  launch.zero(slots, batch.tokens * static_cast<int64_t>(sizeof(int)));
  launch("slots", slots_kernel, batch.sequences, 1, 1, kGroupThreads, 0, batch, slots);
  return slots;
}

}  // namespace ctxkern
