// Long sums, cut into pieces: the rounding of a sum in float32 grows with its length.
#pragma once

#include "tile.h"

namespace ctxkern {
namespace {

// Steps of a sum in float32 before it is added to what is in memory: over rows of a context, and over D or E.
constexpr int64_t kLongest = 256, kDeepest = 512;

// to [rows, lanes] in float32, rows `step` apart, (+)= a product whose sum is cut to `longest` steps in float32.
template <class W>
inline void product_in_pieces(int64_t rows, int64_t lanes, int64_t steps, int64_t longest, const Left& a,
                              const Right& b, float* to, int64_t step, bool add = false) {
  Out out{reinterpret_cast<char*>(to), step * 4, add ? Store::f32_add : Store::f32, lanes};
  if (W::PER == 2) longest = steps;
  // once for a sum of nothing, which writes zeros
  for (int64_t s = 0; s == 0 || s < steps; s += longest > 0 ? longest : 1) {
    const int64_t piece = steps - s < longest ? steps - s : longest;
    product_along<W>(rows, piece, {a.data + s * a.step, a.row, a.step}, {b.data + s * b.step, b.step, b.panel}, out);
    out.store = Store::f32_add;
  }
}

}  // namespace
}  // namespace ctxkern
