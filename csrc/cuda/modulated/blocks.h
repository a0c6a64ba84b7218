// How a workspace is spent: blocks of D × E and groups of contexts whose W and G it holds.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../runtime/launch.h"

namespace ctxkern {

// Columns or rows from which products run at the tile's speed, and what the second direction of a grid takes.
constexpr int64_t kNarrow = 64;
constexpr int64_t kMostGroup = 65535;

struct Blocks {
  int64_t rows, columns, group;
};

// size cut to a multiple of kNarrow where it reaches one.
inline int64_t whole(int64_t size) { return size < kNarrow ? size : size / kNarrow * kNarrow; }

// All of D by as many columns as hold all contexts, or fewer contexts where those would be too few.
inline Blocks forward_blocks(int64_t d_in, int64_t d_out, int64_t limit, int64_t element, int64_t budget) {
  int64_t group = std::min(std::max<int64_t>(limit, 1), kMostGroup);
  const int64_t column = d_in * element;
  while (group > 1 && budget / (column * group) < std::min(kNarrow, d_out)) group = (group + 1) / 2;
  return {d_in, std::min(whole(std::max<int64_t>(1, budget / (column * group))), d_out), group};
}

// As many rows of D as hold W or G of all contexts; where those are too few, less of E, then fewer contexts.
inline Blocks backward_blocks(int64_t d_in, int64_t d_out, int64_t context_dim, int64_t limit, int64_t element,
                              int64_t budget) {
  int64_t columns = std::max<int64_t>(d_out, 1), group = std::min(std::max<int64_t>(limit, 1), kMostGroup);
  auto rows = [&] {
    const int64_t sums = group < limit ? (context_dim + 1) * static_cast<int64_t>(sizeof(float)) : 0;
    return budget / (columns * (group * element + sums));
  };
  while (rows() < std::min(kNarrow, d_in) && columns > kNarrow) columns = (columns + 1) / 2;
  while (rows() < std::min<int64_t>(16, d_in) && group > 1) group = (group + 1) / 2;
  return {std::min(whole(std::max<int64_t>(rows(), 1)), d_in), columns, group};
}

}  // namespace ctxkern
