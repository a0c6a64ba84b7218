#include "rows.h"

#include <stdexcept>
#include <utility>

namespace ctxkern {
namespace {

void check(int64_t sequences, int64_t total, const int32_t* bounds, const int64_t* index, int64_t table,
           bool optional) {
  for (int64_t b = 0; index != nullptr && b < sequences; ++b) {
    if (index[b] < (optional ? -1 : 0) || index[b] >= table)
      throw std::invalid_argument("an index lies outside the table");
  }
  if (bounds == nullptr) return;
  bool rising = bounds[0] == 0 && bounds[sequences] == total;
  for (int64_t b = 0; b < sequences; ++b) rising = rising && bounds[b] <= bounds[b + 1];
  if (!rising) throw std::invalid_argument("bounds do not rise from zero to the number of rows");
}

}  // namespace

GroupedRows group_rows(int64_t sequences, int64_t length, int64_t total, const int32_t* bounds, const int64_t* index,
                       int64_t table, bool optional) {
  check(sequences, total, bounds, index, table, optional);
  const auto run_of = [&](int64_t b) {
    return bounds ? Run{bounds[b], bounds[b + 1] - bounds[b]} : Run{b * length, length};
  };
  GroupedRows rows;
  std::vector<int64_t> context_of(sequences, -1);
  std::vector<int64_t> counts;
  if (index == nullptr) {
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t count = run_of(b).count;
      if (count == 0) continue;
      context_of[b] = static_cast<int64_t>(rows.slot.size());
      rows.slot.push_back(b);
      counts.push_back(count);
    }
  } else {
    // from a row of the table to its context, by an open hash: a table may be far larger than the batch
    int64_t size = 16;
    while (size < 2 * sequences) size *= 2;
    std::vector<int64_t> seen(size, -1);
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t count = run_of(b).count;
      if (count == 0 || index[b] < 0) continue;
      int64_t at = static_cast<int64_t>(static_cast<uint64_t>(index[b]) * 0x9E3779B97F4A7C15u >> 20) & (size - 1);
      while (seen[at] >= 0 && rows.slot[seen[at]] != index[b]) at = (at + 1) & (size - 1);
      if (seen[at] < 0) {
        seen[at] = static_cast<int64_t>(rows.slot.size());
        rows.slot.push_back(index[b]);
        counts.push_back(0);
      }
      context_of[b] = seen[at];
      counts[seen[at]] += count;
    }
  }
  const int64_t contexts = static_cast<int64_t>(rows.slot.size());
  rows.first.assign(contexts + 1, 0);
  std::vector<int64_t> each(contexts, 0);
  for (int64_t u = 0; u < contexts; ++u) rows.first[u + 1] = rows.first[u] + counts[u];
  for (int64_t b = 0; b < sequences; ++b) {
    if (context_of[b] >= 0) ++each[context_of[b]];
  }
  rows.run_first.assign(contexts + 1, 0);
  for (int64_t u = 0; u < contexts; ++u) rows.run_first[u + 1] = rows.run_first[u] + each[u];
  rows.runs.resize(rows.run_first[contexts]);
  std::vector<int64_t> at(rows.run_first.begin(), rows.run_first.end() - 1);
  int64_t last = -1;
  bool in_order = true;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t u = context_of[b];
    if (u < 0) {
      in_order = in_order && run_of(b).count == 0;
      continue;
    }
    rows.runs[at[u]++] = run_of(b);
    in_order = in_order && u >= last;
    last = u;
  }
  if (!in_order) {
    rows.order.reserve(rows.first.back());
    for (const Run& run : rows.runs) {
      for (int64_t i = 0; i < run.count; ++i) rows.order.push_back(run.row + i);
    }
  }
  return rows;
}

}  // namespace ctxkern
