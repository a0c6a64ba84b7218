// Small matrix products over 32-bit words: out[m, lanes] = Σ_s A[m, s] B[s, lanes], accumulated in float32 registers.
//
// A word is one float32 or a pair of bfloat16 that lie next to each other along the sum. A is read word by word and
// broadcast, at any strides; B is rows of words, one per step, at least as many as the panel has lanes.
#pragma once

#include <type_traits>
#include <utility>

#include "ahead.h"
#include "out.h"

namespace ctxkern {
namespace {

// The matrix unit's words, of amx.h, with products of their own.
struct Amx;

// Words of one float32.
struct F32 {
  static constexpr int PER = 1;       // elements a word
  static constexpr int64_t STEP = 1;  // words a sum is padded to
  static constexpr Dtype dtype = Dtype::f32;

  static void enter() {}
  static void leave() {}
  static V multiply_add(V acc, V a, V b) { return acc + a * b; }

  // The word at `a` times every lane of b.
  CTXKERN_INLINE static V multiply_add_word(V acc, const char* a, V b) { return acc + splat(load<float>(a)) * b; }

  // b from memory, in no register.
  CTXKERN_INLINE static V multiply_add_from(V acc, V a, const float* b) {
#if defined(__AVX2__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "m"(*reinterpret_cast<const float (*)[VL]>(b)));
    return acc;
#else
    return acc + a * load<V>(b);
#endif
  }
};

#if defined(__AVX512BF16__)
// Words of two bfloat16.
struct Bf16 {
  static constexpr int PER = 2;
  static constexpr int64_t STEP = 1;
  static constexpr Dtype dtype = Dtype::bf16;

  static void enter() {}
  static void leave() {}
  static V multiply_add(V acc, V a, V b) { return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }

  // GCC 12 makes two instructions of it, and on Zen 4 the broadcast takes a third of the time (bench/LOG.md).
  CTXKERN_INLINE static V multiply_add_word(V acc, const char* a, V b) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*reinterpret_cast<const float*>(a)));
    return acc;
  }

  CTXKERN_INLINE static V multiply_add_from(V acc, V a, const float* b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "m"(*reinterpret_cast<const float (*)[VL]>(b)));
    return acc;
  }
};
#endif

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Words that n elements along a sum take.
template <class W>
constexpr int64_t words(int64_t n) {
  return round_up((n + W::PER - 1) / W::PER, W::STEP);
}

struct Left {
  const char* data;
  int64_t row, step;  // bytes
  int64_t far = 0;    // bytes from a row, or a panel, to one that the second cache shall hold meanwhile; 0: none
};

struct Right {
  const float* data;
  int64_t step;            // words
  int64_t panel = 2 * VL;  // words from one panel of two vectors to the next
  int64_t far = 0;         // words to what the second cache shall hold meanwhile; 0: nothing

  const float* at(int64_t lane) const { return data + lane / (2 * VL) * panel; }
};

// A second product of as many rows and lanes, in panels of two vectors, added to sums before they are written; those of
// bfloat16 are rounded first, so that it makes no difference whether a product goes along or is added later.
struct Also {
  Left left;
  Right right;
  int64_t steps;
};

template <class W>
constexpr bool takes_also = !std::is_same_v<W, Amx>;

// Rows of a tile by vectors per row: what the registers hold in addition to a row of B and one broadcast.
constexpr int kRegisters = VL == 16 ? 28 : 12;
template <int NV>
constexpr int kTileRows = NV == 1 ? kRegisters / 2 : kRegisters / NV;

// Read from memory here, and by itself: a tile's loop has no register for it, or it was written a moment ago.
template <class T>
CTXKERN_INLINE T unkept(const T& value) {
  return *const_cast<const volatile T*>(&value);
}

// Every third row of a tile: x86 addresses the two after it as base + stride and base + 2·stride.
template <int MR>
struct Bases {
  static constexpr int kCount = (MR + 2) / 3;

  CTXKERN_INLINE Bases(const char* first, int64_t row) {
#pragma GCC unroll 8
    for (int g = 0; g < kCount; ++g) {
      of[g] = g == 0 ? first : of[g - 1] + 3 * row;
      asm("" : "+r"(of[g]));  // or all are multiplied at once, in a vector
    }
  }

  CTXKERN_INLINE void move(int64_t step) {
#pragma GCC unroll 8
    for (int g = 0; g < kCount; ++g) of[g] += step;
  }

  const char* of[kCount];
};

// A word of each row times those of a row of B.
template <class W, int MR, int NV>
CTXKERN_INLINE void tile_step(V (&acc)[MR][NV], const Bases<MR>& base, int64_t a_row, const float* right) {
  constexpr int KEPT = NV < 4 ? NV : 3;  // a fourth would be one more than there are registers
  V w[KEPT];
#pragma GCC unroll 4
  for (int j = 0; j < KEPT; ++j) w[j] = load<V>(right + j * VL);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    const char* const word = base.of[i / 3] + (i % 3) * a_row;
    if constexpr (NV == 1) {
      acc[i][0] = W::multiply_add_word(acc[i][0], word, w[0]);
    } else {
      const V left = splat(load<float>(word));
#pragma GCC unroll 4
      for (int j = 0; j < KEPT; ++j) acc[i][j] = W::multiply_add(acc[i][j], left, w[j]);
      if constexpr (NV == 4) acc[i][3] = W::multiply_add_from(acc[i][3], left, right + 3 * VL);
    }
  }
}

// Rows `row` and on, NV vectors from lane `lane` on. Operands come by reference and unchanged: copies are written in parts
// and read as vectors, for which a processor waits until all that came before is done (bench/LOG.md).
template <class W, int MR, int NV>
[[gnu::noinline]] void tile(int64_t steps, const Left& a, const Right& b, const Out& out, int64_t row, int64_t lane,
                            Ahead* ahead) {
  const int64_t a_row = a.row, a_step = a.step, b_step = b.step;
  Ahead next;
  if (NV == 4 && ahead) {
    next.from[0] = unkept(ahead->from[0]), next.from[1] = unkept(ahead->from[1]);
    next.bytes = unkept(ahead->bytes), next.at = unkept(ahead->at), next.far = unkept(ahead->far);
  }
  V acc[MR][NV], first[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) first[j] = out.bias ? load<V>(out.bias + lane + j * VL) : V{};
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = first[j];
  }
  // halves: lines of the output that are first asked for at the end of the sum would be waited for, as it is short. Where it
  // is not, a row at a time, as many at once are waited for too
  const bool asks = W::PER == 2 && out.store != Store::f32_stream && out.store != Store::bf16_stream;
  const auto ask = [&](int i) __attribute__((always_inline)) {
    const char* const c = out.at(row + i) + lane * size_of(out.store);
    __builtin_prefetch(c, 1);
    if (NV == 4 || size_of(out.store) == 4) __builtin_prefetch(c + (NV == 4 && out.half != 0 ? out.half : 64), 1);
  };
  int to_ask = NV == 2 && asks && steps >= 16 * MR ? 0 : MR;
  if (asks && to_ask != 0) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) ask(i);
  }
  Bases<MR> base(a.data + row * a_row, a_row);
  const float* right = b.at(lane);
  // of panels: what the first rows ask for serves those after them. A step at a time: many at once are waited for
  const int64_t right_far = row == 0 ? b.far : 0;
  const int64_t left_far = row == 0 && a_step == 8 * VL && lane + NV * VL >= out.lanes ? a.far : 0;
  const bool panels = (right_far | left_far) != 0;
  for (int64_t s = 0; s < steps;) {
    if (W::PER == 2 && NV == 2 && to_ask < MR) ask(to_ask++);
    // a cache line of every row of the tile below this one, while a line of this one is used up
    if (NV < 4 && a_step == 4) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) __builtin_prefetch(base.of[i / 3] + (i % 3 + MR) * a_row);
      if (const int64_t far = unkept(a.far)) {
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) __builtin_prefetch(base.of[i / 3] + i % 3 * a_row + far, 0, 2);
      }
    }
    if (NV < 4 && ahead) ahead->fetch_eight();
    for (const int64_t end = steps - s < 16 ? steps : s + 16; s < end; ++s) {
      if (NV == 4) next.fetch();
      if (NV < 4 && panels) {
        if (right_far) {
#pragma GCC unroll 2
          for (int i = 0; i < 2 * VL; i += 16) __builtin_prefetch(right + right_far + i, 0, 2);
        }
        if (left_far) {
#pragma GCC unroll 2
          for (int i = 0; i < 8 * VL; i += 64) __builtin_prefetch(base.of[0] + left_far + i, 0, 2);
        }
      }
      tile_step<W>(acc, base, a_row, right);
      base.move(a_step);
      right += b_step;
    }
  }
  if (NV == 4 && ahead) ahead->at = next.at;
  if (NV < 4 && out.also) {
    const Also& more = *out.also;
    // as they would be before the second product is added to what the first wrote
    if (W::PER == 2) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = (V)(bf16_bits(acc[i][j]) << 16);
      }
    }
    const int64_t more_row = more.left.row;
    Bases<MR> words(more.left.data + row * more_row, more_row);
    const float* lanes = more.right.at(lane);
    for (int64_t s = 0; s < more.steps; ++s, lanes += more.right.step) {
      tile_step<W>(acc, words, more_row, lanes);
      words.move(more.left.step);
    }
  }
  put(acc, out, row, lane);
}

using TileFn = void (*)(int64_t, const Left&, const Right&, const Out&, int64_t, int64_t, Ahead*);

template <class W, int NV, class Rows>
struct TileTable;
template <class W, int NV, int... I>
struct TileTable<W, NV, std::integer_sequence<int, I...>> {
  static constexpr TileFn of[] = {&tile<W, I + 1, NV>...};
};

template <class W, int NV>
inline TileFn tile_of(int64_t height) {
  return TileTable<W, NV, std::make_integer_sequence<int, kTileRows<NV>>>::of[height - 1];
}

// Bytes: rows that lie a multiple of it apart share one set of the first cache, which holds eight lines at most.
constexpr int64_t kSets = 4096;

// The most rows of a tile. Of rows that share a set, no more than stay near while the words of a line are used up.
template <int NV>
inline int64_t most_rows(const Left& a) {
  constexpr int64_t kFew = 7, kMost = kTileRows<NV>;
  return NV < 4 && kMost > kFew && a.step == 4 && a.row % kSets == 0 ? kFew : kMost;
}

// f(row, height) for tiles of nearly equal height, `most` rows at most.
template <class F>
inline void each_tile(int64_t rows, int64_t most, F&& f) {
  const int64_t tiles = (rows + most - 1) / most;
  if (tiles == 0) return;
  const int64_t least = rows / tiles, higher = rows % tiles;
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int64_t height = least + (t < higher);
    f(row, height);
    row += height;
  }
}

// A panel of NV vectors, from lane `lane` on.
template <class W, int NV>
inline std::enable_if_t<!std::is_same_v<W, Amx>> product(int64_t rows, int64_t steps, const Left& a, const Right& b,
                                                         const Out& out, int64_t lane = 0, Ahead* ahead = nullptr) {
  each_tile(rows, most_rows<NV>(a),
            [&](int64_t row, int64_t height) { tile_of<W, NV>(height)(steps, a, b, out, row, lane, ahead); });
}

// Lines of each that such a product asks for ahead, at most.
template <class W, int NV>
constexpr std::enable_if_t<!std::is_same_v<W, Amx>, int64_t> lines_ahead(int64_t rows, int64_t steps) {
  return (rows + kTileRows<NV> - 1) / kTileRows<NV> * steps;
}

// All panels of as many lanes as the output has; B must be readable up to a multiple of VL lanes. bias, if any, is padded
// alike.
template <class W>
inline std::enable_if_t<!std::is_same_v<W, Amx>> product_wide(int64_t rows, int64_t steps, const Left& a,
                                                              const Right& b, const Out& out) {
  for (int64_t j = 0; j < out.lanes; j += 2 * VL) {
    if (out.lanes - j > VL) {
      product<W, 2>(rows, steps, a, b, out, j);
    } else {
      product<W, 1>(rows, steps, a, b, out, j);
    }
  }
}

// The same, all panels for a tile's rows before the next rows: for sums so short that reading and writing the output counts.
template <class W>
inline std::enable_if_t<!std::is_same_v<W, Amx>> product_along(int64_t rows, int64_t steps, const Left& a,
                                                               const Right& b, const Out& out, Ahead* ahead = nullptr) {
  each_tile(rows, most_rows<2>(a), [&](int64_t row, int64_t height) {
    for (int64_t j = 0; j < out.lanes; j += 2 * VL) {
      if (out.lanes - j > VL) {
        tile_of<W, 2>(height)(steps, a, b, out, row, j, ahead);
      } else {
        tile_of<W, 1>(height)(steps, a, b, out, row, j, ahead);
      }
    }
  });
}

}  // namespace
}  // namespace ctxkern
