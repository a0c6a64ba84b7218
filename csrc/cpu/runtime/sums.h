// Long sums, cut into pieces: the rounding of a sum in float32 grows with its length.
#pragma once

#include "tile.h"

namespace ctxkern {
namespace {

// Steps of a sum in float32 before it is added to what is in memory: over rows of a context, and over D or E.
constexpr int64_t kLongest = 256, kDeepest = 512;

// Whether a product of so many lanes takes four vectors of a row at once: where there are registers for them.
template <class W>
constexpr bool by_four(int64_t lanes) {
  return VL == 16 && W::STEP == 1 && lanes % (4 * VL) == 0;
}

// to [rows, lanes] in float32, rows `step` apart, (+)= a product whose sum is cut to `longest` steps in float32. ahead: as
// `product` has it; the matrix unit asks for nothing.
template <class W>
inline void product_in_pieces(int64_t rows, int64_t lanes, int64_t steps, int64_t longest, const Left& a,
                              const Right& b, float* to, int64_t step, bool add = false, Ahead* ahead = nullptr) {
  Out out{reinterpret_cast<char*>(to), step * 4, add ? Store::f32_add : Store::f32, lanes};
  out.half = 2 * VL * 4;
  const bool four = by_four<W>(lanes) && b.panel == 2 * VL;
  if (W::PER == 2) longest = steps;
  // once for a sum of nothing, which writes zeros
  for (int64_t s = 0; s == 0 || s < steps; s += longest > 0 ? longest : 1) {
    const int64_t piece = steps - s < longest ? steps - s : longest;
    const Left left{a.data + s * a.step, a.row, a.step};
    const Right right{b.data + s * b.step, b.step, b.panel};
    if (four) {
      for (int64_t j = 0; j < lanes; j += 4 * VL) product<W, 4>(rows, piece, left, right, out, j, ahead);
    } else {
      product_along<W>(rows, piece, left, right, out, ahead);
    }
    out.store = Store::f32_add;
  }
}

}  // namespace
}  // namespace ctxkern
