// Products whose right operand lies as rows of bfloat16, two of which are a step of the sum: registers make the words on
// the way, so that nothing is laid out first.
#pragma once

#include "pack.h"

namespace ctxkern {
namespace {

// `rows` rows of elements, `row` bytes apart.
struct RowPairs {
  const char* data;
  int64_t row, rows;
};

// Whether products of W take such an operand.
template <class W>
constexpr bool kTakesRowPairs = false;

// out [rows, lanes] in float32, or added to it, where lanes are padded to whole vectors: zeros, or nothing added. ahead:
// what to ask for meanwhile, or null.
template <class W>
void product_of_row_pairs(int64_t rows, const Left& a, const RowPairs& b, const Out& out, Ahead* ahead = nullptr);

#if defined(__AVX512BF16__)

template <>
constexpr bool kTakesRowPairs<Bf16> = true;

// Rows of a tile: what registers hold in addition to two rows, the words of them, and one broadcast.
constexpr int kPairedRows = 12;

// Rows `row` and on, NV vectors from lane `lane` on. Sums of two vectors hold the lanes in the order of `vpunpck`, four of
// the first vector and four of the second by turns, until the end.
template <int MR, int NV>
[[gnu::noinline]] void paired_tile(const Left& a, const RowPairs& b, const Out& out, int64_t row, int64_t lane,
                                   Ahead* ahead) {
  const int64_t a_row = a.row, a_step = a.step, b_row = b.row, lanes = out.lanes - lane;
  const auto there = static_cast<__mmask32>((uint64_t{1} << (lanes < NV * VL ? lanes : NV * VL)) - 1);
  const __m512i order = load<__m512i>(kZip.low);
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = V{};
  }
  // as in `tile`
  constexpr int BASES = (MR + 2) / 3;
  const char* base[BASES];
#pragma GCC unroll 4
  for (int g = 0; g < BASES; ++g) {
    base[g] = g == 0 ? a.data + row * a_row : base[g - 1] + 3 * a_row;
    asm("" : "+r"(base[g]));
  }
  const auto step = [&](__m512i first, __m512i second) __attribute__((always_inline)) {
    V w[NV];
    if constexpr (NV == 1) {
      w[0] = (V)_mm512_permutex2var_epi16(first, order, second);
    } else {
      w[0] = (V)_mm512_unpacklo_epi16(first, second);
      w[1] = (V)_mm512_unpackhi_epi16(first, second);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const V left = splat(load<float>(base[i / 3] + i % 3 * a_row));
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = Bf16::multiply_add(acc[i][j], left, w[j]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < BASES; ++g) base[g] += a_step;
  };
  const char* from = b.data + lane * 2;
  int64_t r = 0;
  for (; r + 1 < b.rows; r += 2, from += 2 * b_row) {
    if (ahead) ahead->fetch();
    step(_mm512_maskz_loadu_epi16(there, from), _mm512_maskz_loadu_epi16(there, from + b_row));
  }
  if (r < b.rows) step(_mm512_maskz_loadu_epi16(there, from), __m512i{});
  if constexpr (NV == 2) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const __m512 first = (__m512)acc[i][0], second = (__m512)acc[i][1];
      acc[i][0] = (V)_mm512_permutex2var_ps(first, low, second);
      acc[i][1] = (V)_mm512_permutex2var_ps(first, high, second);
    }
  }
  const bool add = out.store == Store::f32_add;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      char* const to = out.at(row + i) + (lane + j * VL) * 4;
      store(to, add ? acc[i][j] + load<V>(to) : acc[i][j]);
    }
  }
}

using PairedFn = void (*)(const Left&, const RowPairs&, const Out&, int64_t, int64_t, Ahead*);

template <int NV, class Rows>
struct PairedTable;
template <int NV, int... I>
struct PairedTable<NV, std::integer_sequence<int, I...>> {
  static constexpr PairedFn of[] = {&paired_tile<I + 1, NV>...};
};

template <class W>
void product_of_row_pairs(int64_t rows, const Left& a, const RowPairs& b, const Out& out, Ahead* ahead) {
  using Rows = std::make_integer_sequence<int, kPairedRows>;
  for (int64_t j = 0; j < out.lanes; j += 2 * VL) {
    const PairedFn* const of = out.lanes - j > VL ? PairedTable<2, Rows>::of : PairedTable<1, Rows>::of;
    each_tile(rows, kPairedRows, [&](int64_t row, int64_t height) { of[height - 1](a, b, out, row, j, ahead); });
  }
}

#endif

}  // namespace
}  // namespace ctxkern
