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

// All panels of an output, with its bias and second product, of a sum that is cut likewise: all pieces for the rows of a tile
// before the next rows, while their part of the output is near.
template <class W>
inline void product_wide_in_pieces(int64_t rows, int64_t steps, int64_t longest, const Left& a, const Right& b,
                                   const Out& out) {
  if (W::PER == 2 || steps <= longest) return product_wide<W>(rows, steps, a, b, out);
  if constexpr (W::PER == 1) {
    Out piece = out;
    for (int64_t j = 0; j < out.lanes; j += 2 * VL) {
      const bool two = out.lanes - j > VL;
      each_tile(rows, most_rows<2>(a), [&](int64_t row, int64_t height) {
        const TileFn tile = two ? tile_of<W, 2>(height) : tile_of<W, 1>(height);
        for (int64_t i = 0; i < height; ++i) {
          const char* const to = out.at(row + i) + j * size_of(out.store);
          __builtin_prefetch(to, 1);
          __builtin_prefetch(to + 64, 1);
        }
        piece.store = out.store, piece.bias = nullptr, piece.also = nullptr;
        for (int64_t s = 0; s < steps; s += longest) {
          if (s + longest >= steps) piece.bias = out.bias, piece.also = out.also;
          tile(steps - s < longest ? steps - s : longest, {a.data + s * a.step, a.row, a.step, a.far},
               {b.data + s * b.step, b.step, b.panel, b.far}, piece, row, j, nullptr);
          piece.store = added(out.store);
        }
      });
    }
  }
}

}  // namespace
}  // namespace ctxkern
