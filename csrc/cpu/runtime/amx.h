// Products of tile.h on the matrix unit (AMX): tiles of 16 rows of 16 words, two by two in the registers.
//
// A sum is padded to whole tiles (STEP words); the last rows of a product get tiles of fewer rows. With
// CTXKERN_EMULATE_AMX the tile instructions are plain C++, to test this file where there is no matrix unit.
#pragma once

#include "tile.h"

namespace ctxkern {
namespace {

#if defined(CTXKERN_EMULATE_AMX)

struct Tiles16 {
  int rows[8] = {};
  uint32_t words[8][16][16] = {};
};
thread_local Tiles16 emulated;

inline void tile_configure(int top, int bottom) {
  for (int i = 0; i < 8; ++i) emulated.rows[i] = i < 4 ? (i < 2 ? top : bottom) : i == 4 ? top : i == 5 ? bottom : 16;
}
inline void tile_release() { emulated = Tiles16{}; }

inline void emulated_zero(int T) { std::memset(emulated.words[T], 0, sizeof emulated.words[T]); }
inline void emulated_read(int T, const void* from, int64_t stride) {
  for (int i = 0; i < emulated.rows[T]; ++i)
    std::memcpy(emulated.words[T][i], static_cast<const char*>(from) + i * stride, 64);
}
inline void emulated_write(int T, void* to, int64_t stride) {
  for (int i = 0; i < emulated.rows[T]; ++i) std::memcpy(static_cast<char*>(to) + i * stride, emulated.words[T][i], 64);
}
inline void emulated_multiply_add(int C, int A, int B) {
  const auto half = [](uint32_t word, int i) {
    const uint32_t bits = i ? word & 0xffff0000u : word << 16;
    return load<float>(&bits);
  };
  for (int m = 0; m < emulated.rows[C]; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum = load<float>(&emulated.words[C][m][n]);
      for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 2; ++i) sum += half(emulated.words[A][m][k], i) * half(emulated.words[B][k][n], i);
      }
      store(&emulated.words[C][m][n], sum);
    }
  }
}

#define TILE_ZERO emulated_zero
#define TILE_READ emulated_read
#define TILE_WRITE emulated_write
#define TILE_MULTIPLY_ADD emulated_multiply_add

#else

// C in tiles 0 to 3, A in 4 (the upper rows) and 5 (the lower), B in 6 and 7.
inline void tile_configure(int top, int bottom) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    const int rows = i < 4 ? (i < 2 ? top : bottom) : i == 4 ? top : i == 5 ? bottom : 16;
    config.rows[i] = static_cast<uint8_t>(rows ? rows : 16);
    config.bytes[i] = 64;
  }
  _tile_loadconfig(&config);
}
inline void tile_release() { _tile_release(); }

// Macros: the intrinsics take the number of a tile as a literal.
#define TILE_ZERO _tile_zero
#define TILE_READ _tile_loadd
#define TILE_WRITE _tile_stored
#define TILE_MULTIPLY_ADD _tile_dpbf16ps

#endif

// Rows that the tiles of this thread are configured for; other code may have changed them between two items of work.
thread_local int configured = -1;

// Words of two bfloat16 for the matrix unit.
struct Amx {
  static constexpr int PER = 2;
  static constexpr int64_t STEP = 16;
  static constexpr Dtype dtype = Dtype::bf16;

  static void enter() { configured = -1; }
  static void leave() {
    if (configured >= 0) tile_release();
    configured = -1;
  }
};

constexpr int64_t kTile = 16, kBlock = 2 * kTile;

// Words of a left operand that lies step after step, turned to lie row after row, at a time.
constexpr int64_t kTurned = 1024;
// Not on the stack: compilers that guard it touch every page of it in every call.
alignas(64) thread_local float turned_block[kBlock * kTurned];

// rows (at most kBlock) of `steps` words, [kBlock, steps]
inline void turn(float* to, int64_t rows, int64_t steps, Left a) {
  for (int64_t s = 0; s < steps; s += VL) {
    for (int64_t i = 0; i < rows; i += VL) {
      V r[VL];
      const int64_t count = rows - i < VL ? rows - i : VL;
      for (int64_t j = 0; j < VL; ++j) r[j] = load_f32_first<Dtype::f32>(a.data + (s + j) * a.step + i * a.row, count);
      transpose(r);
      for (int64_t j = 0; j < count; ++j) store(to + (i + j) * steps + s, r[j]);
    }
  }
}

// One or two vectors of up to kBlock rows, added to what the tiles hold.
template <int NV>
inline void multiply(int64_t rows, int64_t steps, Left a, Right b) {
  for (int64_t s = 0; s < steps; s += kTile) {
    TILE_READ(6, b.data + s * b.step, b.step * 4);
    if (NV == 2) TILE_READ(7, b.data + s * b.step + VL, b.step * 4);
    TILE_READ(4, a.data + s * 4, a.row);
    TILE_MULTIPLY_ADD(0, 4, 6);
    if (NV == 2) TILE_MULTIPLY_ADD(1, 4, 7);
    if (rows > kTile) {
      TILE_READ(5, a.data + kTile * a.row + s * 4, a.row);
      TILE_MULTIPLY_ADD(2, 5, 6);
      if (NV == 2) TILE_MULTIPLY_ADD(3, 5, 7);
    }
  }
}

// The sums of NV vectors of up to kBlock rows, [kBlock, NV * VL]. turned: a left operand that lay step after step.
template <int NV>
inline void sums_of(int64_t rows, int64_t steps, Left a, Right b, const float* turned, float* sums) {
  const int top = static_cast<int>(rows < kTile ? rows : kTile), bottom = static_cast<int>(rows) - top;
  if (configured != top * 32 + bottom) tile_configure(top, bottom);
  configured = top * 32 + bottom;
  alignas(64) float buffer[kBlock * kTile];
  for (int j = 0; j < NV; j += 2) {
    constexpr int kPair = NV == 1 ? 1 : 2;
    const Right panel{b.data + j * VL, b.step};
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    if (a.step == 4) {
      multiply<kPair>(rows, steps, a, panel);
    } else if (turned) {
      multiply<kPair>(rows, steps, {reinterpret_cast<const char*>(turned), steps * 4, 4}, panel);
    } else {
      for (int64_t s = 0; s < steps; s += kTile) {
        turn(buffer, rows, kTile, {a.data + s * a.step, a.row, a.step});
        multiply<kPair>(rows, kTile, {reinterpret_cast<const char*>(buffer), kTile * 4, 4},
                        {panel.data + s * b.step, b.step});
      }
    }
    constexpr int64_t row = NV * VL, stride = row * 4;
    TILE_WRITE(0, sums + j * VL, stride);
    if (kPair == 2) TILE_WRITE(1, sums + (j + 1) * VL, stride);
    if (bottom > 0) {
      TILE_WRITE(2, sums + kTile * row + j * VL, stride);
      if (kPair == 2) TILE_WRITE(3, sums + kTile * row + (j + 1) * VL, stride);
    }
  }
}

template <int MR, int NV>
inline void put_rows(const Out& out, int64_t row, int64_t lane, const float* sums) {
  V v[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) v[i][j] = load<V>(sums + (i * NV + j) * VL);
  }
  if (out.bias) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const V add = load<V>(out.bias + lane + j * VL);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) v[i][j] += add;
    }
  }
  put(v, out, row, lane);
}

template <int NV>
inline void put_sums(int64_t rows, const Out& out, int64_t row, int64_t lane, const float* sums) {
  constexpr int kRows = 16 / NV;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) put_rows<kRows, NV>(out, row + i, lane, sums + i * NV * VL);
  for (; i < rows; ++i) put_rows<1, NV>(out, row + i, lane, sums + i * NV * VL);
}

// Of each, asked for while the unit takes a step.
constexpr int64_t kLinesAhead = 4;

template <class W, int NV>
inline std::enable_if_t<std::is_same_v<W, Amx>> product(int64_t rows, int64_t steps, const Left& a, const Right& b,
                                                        const Out& out, int64_t lane = 0, Ahead* ahead = nullptr) {
  alignas(64) float sums[kBlock * NV * VL];
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t height = rows - row < kBlock ? rows - row : kBlock;
    sums_of<NV>(height, steps, {a.data + row * a.row, a.row, a.step}, {b.at(lane), b.step}, nullptr, sums);
    for (int64_t i = 0; ahead && i < kLinesAhead * steps; ++i) ahead->fetch_second();
    put_sums<NV>(height, out, row, lane, sums);
  }
}

template <class W, int NV>
constexpr std::enable_if_t<std::is_same_v<W, Amx>, int64_t> lines_ahead(int64_t rows, int64_t steps) {
  return (rows + kBlock - 1) / kBlock * kLinesAhead * steps;
}

// Sums of a block that wait to be put: read at once, they would wait for the matrix unit, and it for them.
struct Pending {
  const Out& out;
  int64_t row = 0, rows = 0, lane = 0;
  const float* sums = nullptr;

  void put() const {
    if (!sums) return;
    if (out.lanes - lane > VL) {
      put_sums<2>(rows, out, row, lane, sums);
    } else {
      put_sums<1>(rows, out, row, lane, sums);
    }
  }
};

template <class W>
inline std::enable_if_t<std::is_same_v<W, Amx>> product_wide(int64_t rows, int64_t steps, const Left& a, const Right& b,
                                                             const Out& out) {
  alignas(64) float sums[2][kBlock * 2 * VL];
  Pending before{out};
  for (int64_t row = 0, at = 0; row < rows; row += kBlock) {
    const int64_t height = rows - row < kBlock ? rows - row : kBlock;
    const Left left{a.data + row * a.row, a.row, a.step};
    const bool turns = a.step != 4 && steps <= kTurned;
    float* const turned = turns ? turned_block : nullptr;
    if (turns) turn(turned, height, steps, left);
    for (int64_t j = 0; j < out.lanes; j += 2 * VL, at ^= 1) {
      if (out.lanes - j > VL) {
        sums_of<2>(height, steps, left, {b.at(j), b.step}, turned, sums[at]);
      } else {
        sums_of<1>(height, steps, left, {b.at(j), b.step}, turned, sums[at]);
      }
      before.put();
      before.row = row, before.rows = height, before.lane = j, before.sums = sums[at];
    }
  }
  before.put();
}

// Blocks of rows meet all panels there as well.
template <class W>
inline std::enable_if_t<std::is_same_v<W, Amx>> product_along(int64_t rows, int64_t steps, const Left& a,
                                                              const Right& b, const Out& out, Ahead* = nullptr) {
  product_wide<W>(rows, steps, a, b, out);
}

}  // namespace
}  // namespace ctxkern
