#pragma once

#include <cstdint>
#include <vector>

namespace ctxkern {

// Adjacent rows of x, all of one context.
struct Run {
  int64_t row, count;
};

// Rows of x by context: those of one context together, contexts in the order in which they first occur. A view.
struct Rows {
  int64_t contexts, count;   // U, rows in all
  const int64_t* slot;       // [U] row of the context table
  const int64_t* first;      // [U + 1] grouped row at which each context's begin
  const Run* runs;           // in grouped order
  const int64_t* run_first;  // [U + 1]
  const int64_t* order;      // [count] row of x of each grouped row; null where grouped order is that of x

  int64_t run_count() const { return run_first[contexts]; }
};

// What a view looks at.
struct GroupedRows {
  std::vector<int64_t> slot, first, run_first, order;
  std::vector<Run> runs;

  Rows view() const {
    return {
        static_cast<int64_t>(slot.size()),     first.back(), slot.data(), first.data(), runs.data(), run_first.data(),
        order.empty() ? nullptr : order.data()};
  }
};

// Of `sequences` sequences: bounds [sequences + 1] (packed) or, where that is null, `length` rows each; index [sequences]
// into a table of `table` rows, or null for the order of the table. Sequences without rows are left out, and with
// `optional` those of index −1. Throws std::invalid_argument where an index lies outside the table, or bounds do not rise
// from 0 to `total`.
GroupedRows group_rows(int64_t sequences, int64_t length, int64_t total, const int32_t* bounds, const int64_t* index,
                       int64_t table, bool optional = false);

}  // namespace ctxkern
