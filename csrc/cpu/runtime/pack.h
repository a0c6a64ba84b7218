// Operands laid out as tile.h reads them: words along the sum, lanes padded with zeros to whole vectors.
#pragma once

#include "tile.h"

namespace ctxkern {
namespace {

// f(Type<D>{}) with D a dtype that words of W are made of.
template <class W, class F>
inline void with_source(Dtype dtype, F&& f) {
  if (dtype == Dtype::f32) return f(Type<Dtype::f32>{});
  if (dtype == Dtype::bf16) return f(Type<Dtype::bf16>{});
  if constexpr (W::PER == 1) f(Type<Dtype::f16>{});
}

// VL words from adjacent elements at p, of which `count` are there; zeros after them.
template <class W, Dtype D>
CTXKERN_INLINE V load_words(const char* p, int64_t count) {
  if constexpr (W::PER == 1) {
    return load_f32_first<D>(p, count);
  } else if constexpr (D == Dtype::bf16) {
#if defined(__AVX512F__)
    if (count >= 2 * VL) return load<V>(p);
    if (count <= 0) return V{};
    return (V)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
#endif
  } else {
#if defined(__AVX512BF16__)
    const V low = load_f32_first<D>(p, count);
    const V high = load_f32_first<D>(p + VL * size_of(D), count - VL);
    return (V)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#endif
  }
  return V{};
}

// VL words, each of one element of `first` and, in a pair, of `second` (null: zero); n elements are there.
template <class W, Dtype D>
CTXKERN_INLINE V zip_words(const char* first, const char* second, int64_t n) {
  const V low = load_f32_first<D>(first, n);
  if constexpr (W::PER == 1) return low;
  const V high = second ? load_f32_first<D>(second, n) : V{};
  if constexpr (D == Dtype::bf16) return (V)((VU)low >> 16 | (VU)high);
  return pair(low, high);
}

// Of `pack_lanes` what has whole blocks alone: by itself, as it then takes a sixth less time (bench/LOG.md).
template <class W, Dtype D>
[[gnu::noinline]] void pack_whole_lanes(float* to, int64_t to_step, const char* from, int64_t row, int64_t count,
                                        Ahead* ahead) {
  for (int64_t lane = 0; lane < 2 * VL; lane += VL) {
    for (int64_t s = 0; s < words<W>(count); s += VL) {
      for (int64_t n = ahead ? ahead->each : 0; n > 0; --n) ahead->fetch();
      const char* const block = from + lane * row + s * W::PER * size_of(D);
      V r[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) r[i] = load_words<W, D>(block + i * row, VL * W::PER);
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) store(to + (s + i) * to_step + lane, r[i]);
    }
  }
}

// to[w, lane] = words w of row `lane`: rows of `count` elements along the sum (`step` bytes apart), as lanes of 2·VL.
// ahead: memory to ask for meanwhile, or null.
template <class W, Dtype D>
[[gnu::noinline]] void pack_lanes(float* to, int64_t to_step, const char* from, int64_t row, int64_t step, int64_t rows,
                                  int64_t count, Ahead* ahead = nullptr) {
  const int64_t steps = words<W>(count), size = size_of(D);
  if (step != size && count > 1) {
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t lane = 0; lane < 2 * VL; ++lane) {
        float word[2] = {0, 0};
        for (int i = 0; i < W::PER; ++i) {
          const int64_t at = s * W::PER + i;
          if (lane < rows && at < count) word[i] = load_scalar(D, from + lane * row + at * step);
        }
        if constexpr (W::PER == 1) {
          to[s * to_step + lane] = word[0];
        } else {
          char* const pair = reinterpret_cast<char*>(to + s * to_step + lane);
          store_scalar(Dtype::bf16, pair, word[0]);
          store_scalar(Dtype::bf16, pair + 2, word[1]);
        }
      }
    }
    return;
  }
  if (rows >= 2 * VL && count % (VL * W::PER) == 0) return pack_whole_lanes<W, D>(to, to_step, from, row, count, ahead);
  for (int64_t lane = 0; lane < 2 * VL; lane += VL) {
    const char* const block = from + lane * row;
    for (int64_t s = 0; s < steps; s += VL) {
      for (int64_t n = ahead ? ahead->each : 0; n > 0; --n) ahead->fetch();
      V r[VL];
      const int64_t left = count - s * W::PER;
      if (lane + VL <= rows && left >= VL * W::PER) {
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) r[i] = load_words<W, D>(block + i * row + s * W::PER * size, VL * W::PER);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) {
          r[i] = lane + i < rows ? load_words<W, D>(block + i * row + s * W::PER * size, left) : V{};
        }
      }
      transpose(r);
      if (steps - s >= VL) {
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) store(to + (s + i) * to_step + lane, r[i]);
        continue;
      }
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) {
        if (i < steps - s) store(to + (s + i) * to_step + lane, r[i]);
      }
    }
  }
}

#if defined(__AVX512F__)
// Places in two vectors of 16-bit elements of which the words of their first and of their second halves are made.
struct Zip {
  alignas(64) uint16_t low[32], high[32];
  constexpr Zip() : low(), high() {
    for (int i = 0; i < 32; ++i) {
      low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      high[i] = static_cast<uint16_t>(low[i] + 16);
    }
  }
};
constexpr Zip kZip;
#endif

// to[w, lane] = words along the rows: row w (or rows 2w and 2w + 1) of `columns` elements, `step` bytes apart, as lanes.
// map: the row to read for each, or null. panel: words from one panel of 2·VL lanes to the next.
template <class W, Dtype D>
[[gnu::noinline]] void pack_rows(float* to, int64_t to_step, const char* from, int64_t row, int64_t step, int64_t rows,
                                 int64_t columns, const int64_t* map = nullptr, int64_t panel = 2 * VL) {
  const int64_t size = size_of(D), steps = words<W>(rows), beyond = panel - 2 * VL;
  const auto at = [&](int64_t r) { return r < rows ? from + (map ? map[r] : r) * row : nullptr; };
  for (int64_t s = 0; s < steps; ++s) {
    const char* const first = at(s * W::PER);
    const char* const second = W::PER == 2 ? at(s * W::PER + 1) : nullptr;
    float* out = to + s * to_step;
    int64_t c = 0;
#if defined(__AVX512F__)
    if constexpr (W::PER == 2 && D == Dtype::bf16) {
      const __m512i low = load<__m512i>(kZip.low), high = load<__m512i>(kZip.high);
      for (; first && step == size && c < columns; c += 2 * VL, out += beyond) {
        const __m512i a = (__m512i)load_words<W, D>(first + c * 2, columns - c);
        const __m512i b = second ? (__m512i)load_words<W, D>(second + c * 2, columns - c) : __m512i{};
        store(out + c, _mm512_permutex2var_epi16(a, low, b));
        if (columns - c > VL) store(out + c + VL, _mm512_permutex2var_epi16(a, high, b));
      }
    }
#endif
    for (; c < columns; c += VL, out += c % (2 * VL) == 0 ? beyond : 0) {
      if (!first) {
        store(out + c, V{});
      } else if (step == size || columns == 1) {
        store(out + c, zip_words<W, D>(first + c * size, second ? second + c * size : nullptr, columns - c));
      } else {
        float low[VL] = {}, high[VL] = {};
        for (int64_t i = 0; i < VL && c + i < columns; ++i) {
          low[i] = load_scalar(D, first + (c + i) * step);
          if (second) high[i] = load_scalar(D, second + (c + i) * step);
        }
        store(out + c, zip_words<W, Dtype::f32>(reinterpret_cast<char*>(low), reinterpret_cast<char*>(high), VL));
      }
    }
  }
}

// A panel of 2·VL lanes, [words along the sum, lanes], of a matrix whose elements are `row` bytes apart along the sum and
// `column` bytes from lane to lane.
template <class W, Dtype D>
inline void pack_matrix(float* to, const char* from, int64_t row, int64_t column, int64_t count, int64_t lanes) {
  if (row == size_of(D)) return pack_lanes<W, D>(to, 2 * VL, from, column, row, lanes, count);
  pack_rows<W, D>(to, 2 * VL, from, row, column, count, lanes);
}

// to[r, w] = words w of row r, as a left operand; padded with zeros to words<W>(columns). to_row: words, as many where 0.
template <class W, Dtype D>
[[gnu::noinline]] void pack_left(float* to, const char* from, int64_t row, int64_t rows, int64_t columns,
                                 const int64_t* map = nullptr, int64_t to_row = 0) {
  const int64_t steps = words<W>(columns), apart = to_row > 0 ? to_row : steps;
  for (int64_t r = 0; r < rows; ++r) {
    const char* const p = from + (map ? map[r] : r) * row;
    float* const out = to + r * apart;
    for (int64_t s = 0; s < steps; s += VL) {
      const V v = load_words<W, D>(p + s * W::PER * size_of(D), columns - s * W::PER);
      if (steps - s >= VL) {
        store(out + s, v);
      } else {
        store_first(out + s, v, 4 * (steps - s));
      }
    }
  }
}

// to[j] = elements of a vector with any stride as float32, zeros from n to `padded`.
inline void pack_vector(float* to, Dtype dtype, const char* from, int64_t stride, int64_t n, int64_t padded) {
  const int64_t size = size_of(dtype);
  with_dtype(dtype, [&](auto type) {
    constexpr Dtype D = decltype(type)::value;
    if (stride == 1) {
      for (int64_t j = 0; j < padded; j += VL) store(to + j, load_f32_first<D>(from + j * size, n - j));
    } else {
      for (int64_t j = 0; j < padded; ++j) to[j] = j < n ? load_scalar(D, from + j * stride * size) : 0.0f;
    }
  });
}

// n float32 to elements of a dtype, `stride` apart.
inline void write_vector(Dtype dtype, char* to, int64_t stride, const float* from, int64_t n) {
  const int64_t size = size_of(dtype);
  if (stride != 1) {
    for (int64_t j = 0; j < n; ++j) store_scalar(dtype, to + j * stride * size, from[j]);
    return;
  }
  with_dtype(dtype, [&](auto type) {
    for (int64_t j = 0; j < n; j += VL) store_as_first<decltype(type)::value>(to + j * size, load<V>(from + j), n - j);
  });
}

// Takes aligned pieces of one block; from null it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class T = float>
  T* take(int64_t count) {
    used_ = round_up(used_, 64);
    char* const at = base_ ? base_ + used_ : nullptr;
    used_ += count * static_cast<int64_t>(sizeof(T));
    return reinterpret_cast<T*>(at);
  }

  int64_t used() const { return round_up(used_, 64); }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace ctxkern
