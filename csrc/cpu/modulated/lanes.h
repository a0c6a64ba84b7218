// Weights with the contexts as lanes: `bilinear` is read as it lies, a word at a time, and what is turned are the weights of
// as many contexts as a vector holds. The sums are those of `weight_panel` and its product, in the same order.
#pragma once

#include "operands.h"

namespace ctxkern {
namespace {

// The contexts as words along K by lanes, [words of K, U padded].
template <class W>
class ContextLanes {
 public:
#if defined(__AVX512F__)
  static constexpr bool kThere = !std::is_same_v<W, Amx>;
#else
  static constexpr bool kThere = false;
#endif

  explicit ContextLanes(const Call& q)
      : steps_(words<W>(q.context_dim)),
        count_(q.rows->contexts),
        step_(round_up(count_, VL) + VL),
        half_(q.context_dim % W::PER != 0) {
    bool read = false;
    for (int i = 0; i < q.projections; ++i) read = read || reads(q.projection[i]);
    there_ = kThere && read && steps_ > 0 && worth(count_);
  }

  void place(Arena& arena) { data_ = there_ ? arena.take(steps_ * step_) : nullptr; }

  void pack(const Contexts<W>& contexts) const {
    if (!there_) return;
    for (int64_t s = 0; s < steps_; ++s) {
      for (int64_t u = 0; u < step_; ++u) data_[s * step_ + u] = u < count_ ? contexts.along_k[u * steps_ + s] : 0.0f;
    }
  }

  // Whether weights of so many contexts take less time so.
  bool take(const Projection& p, int64_t contexts) const { return there_ && worth(contexts) && reads(p); }

  const float* at(int64_t u) const { return data_ + u; }
  int64_t steps() const { return steps_; }
  int64_t step() const { return step_; }
  // Whether the last word is one element.
  bool half() const { return half_; }

 private:
  // Whether `bilinear` holds words where it lies.
  static bool reads(const Projection& p) { return p.bilinear.dtype == W::dtype && p.bilinear.strides[2] == 1; }

  // Of many contexts more is turned than of `bilinear`, and lanes without a context are multiplied too. A few of those cost
  // less than turning blocks that words of K do not fill (bench/LOG.md).
  bool worth(int64_t contexts) const {
    const int64_t last = contexts % 16;
    const bool nearly = contexts < 16 && last >= 12 && steps_ % VL != 0;
    return contexts <= 32 && (last == 0 || last == 7 || last == 8 || last == 15 || nearly);
  }

  int64_t steps_, count_, step_;
  bool half_, there_;
  float* data_ = nullptr;
};

// Columns of a tile, which takes two rows: as many sums as are begun before the first is done, which of bfloat16 are more.
template <class W>
constexpr int64_t lane_columns(int64_t lanes, int64_t vectors) {
  return vectors == 1 && (lanes == 8 || W::PER == 2) ? 8 : 4;
}

// How often each tile of the first vectors asks for what is ahead, of `panels` panels.
template <class W>
inline int64_t fetches_of(const Ahead& ahead, int64_t panels, int64_t contexts) {
  const int64_t tiles = panels * (2 * VL / lane_columns<W>(contexts > 8 ? 16 : 8, contexts == 32 ? 2 : 1));
  return ((ahead.bytes + 63) / 64 + tiles - 1) / tiles;
}

// Rows d and d + 1, columns e to e + 2·VL of the weights of contexts begin to end, `context` bytes apart: words of both rows
// where pairs lie along D, else one row and `half` bytes on the other. bias: those of weight, as `panel_bias` has them.
// fetches: as `fetches_of` has them.
template <class W, bool along_d>
void lane_weights(const ContextLanes<W>& contexts, const Projection& p, int64_t d, int64_t e, int64_t begin,
                  int64_t end, const float* bias, char* to, int64_t context, int64_t half, Ahead& ahead,
                  int64_t fetches);

#if defined(__AVX512F__)

// Words that a tile's columns make in all: of two rows and 2·VL columns.
template <class W>
constexpr int64_t kLaneWords = 4 * VL / W::PER;

// A vector of contexts, or two that share what is read of `bilinear`.
template <class W, int lanes>
struct LaneVector {
  using T = V;
  CTXKERN_INLINE static void add_word(T (&acc)[1], const char* a, const T (&b)[1]) {
    acc[0] = W::multiply_add_word(acc[0], a, b[0]);
  }

  CTXKERN_INLINE static void add_word(T (&acc)[2], const char* a, const T (&b)[2]) {
    const V word = splat(load<float>(a));
    acc[0] = W::multiply_add(acc[0], word, b[0]), acc[1] = W::multiply_add(acc[1], word, b[1]);
  }

  // Of a word of one element, with nothing of what follows it.
  template <int N>
  CTXKERN_INLINE static void add_element(T (&acc)[N], const char* a, const T (&b)[N]) {
    const V word = (V)_mm512_set1_epi32(load<uint16_t>(a));
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) acc[i] = W::multiply_add(acc[i], word, b[i]);
  }

  CTXKERN_INLINE static T pair(T low, T high) { return ctxkern::pair(low, high); }

  // rows[i] = lane i of 16 of them
  CTXKERN_INLINE static void turn(const float* from, V (&rows)[lanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = load<V>(from + i * lanes);
    transpose(rows);
  }
};

template <class W>
struct LaneVector<W, 8> {
  typedef float T __attribute__((vector_size(32)));

  CTXKERN_INLINE static void add_word(T (&acc)[1], const char* a, const T (&b)[1]) {
    if constexpr (W::PER == 1) {
      acc[0] += load<float>(a) * b[0];
    } else {
      asm("vdpbf16ps %2%{1to8%}, %1, %0" : "+v"(acc[0]) : "v"(b[0]), "m"(*reinterpret_cast<const float*>(a)));
    }
  }

#if defined(__AVX512BF16__)
  CTXKERN_INLINE static void add_element(T (&acc)[1], const char* a, const T (&b)[1]) {
    acc[0] = (T)_mm256_dpbf16_ps((__m256)acc[0], (__m256bh)_mm256_set1_epi32(load<uint16_t>(a)), (__m256bh)b[0]);
  }

  CTXKERN_INLINE static T pair(T low, T high) {
    alignas(32) static constexpr uint16_t kOrder[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
    const __m256i both = (__m256i)_mm256_cvtne2ps_pbh((__m256)high, (__m256)low);
    return (T)_mm256_permutexvar_epi16(load<__m256i>(kOrder), both);
  }
#endif

  CTXKERN_INLINE static void turn(const float* from, V (&rows)[8]) {
    __m512 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512d low = _mm512_castpd256_pd512(load<__m256d>(from + i * 8));
      r[i] = (__m512)_mm512_insertf64x4(low, load<__m256d>(from + (8 + i) * 8), 1);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2)
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 8
      for (int j = i; j < i + 2; ++j) {
        r[2 * j - i] = (__m512)_mm512_unpacklo_pd((__m512d)t[j], (__m512d)t[j + 2]);
        r[2 * j - i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[j], (__m512d)t[j + 2]);
      }
    }
    const __m512i low = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
#pragma GCC unroll 8
    for (int j = 0; j < 4; ++j) {
      rows[j] = (V)_mm512_permutex2var_pd((__m512d)r[j], low, (__m512d)r[j + 4]);
      rows[j + 4] = (V)_mm512_permutex2var_pd((__m512d)r[j], high, (__m512d)r[j + 4]);
    }
  }
};

// to[vectors, w, lanes]: the weights of one or two vectors of contexts, as words: two rows of a column where pairs lie along
// D, else two columns of a row. fetches: how often `ahead` asks for memory meanwhile.
template <class W, bool along_d, int lanes, int vectors>
[[gnu::noinline]] void lane_tile(const ContextLanes<W>& contexts, int64_t u, const char* first, const char* second,
                                 int64_t column, const float* bias, float* to, Ahead& ahead, int64_t fetches) {
  using Vector = LaneVector<W, lanes>;
  using T = typename Vector::T;
  constexpr int COLUMNS = lane_columns<W>(lanes, vectors), BASES = COLUMNS / 2;
  Ahead next;
  next.from[0] = unkept(ahead.from[0]), next.from[1] = unkept(ahead.from[1]);
  next.bytes = unkept(ahead.bytes), next.at = unkept(ahead.at), next.far = unkept(ahead.far);
  T acc[2][COLUMNS][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 8
    for (int e = 0; e < COLUMNS; ++e) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) acc[i][e][v] = T{} + bias[i * 2 * VL + e];
    }
  }
  const char* base[BASES];
#pragma GCC unroll 8
  for (int g = 0; g < BASES; ++g) base[g] = (g % 2 == 0 ? first : second) + g / 2 * 4 * column;
  const float* words = contexts.at(u);
  // a word of each column times one of the contexts
  const auto add = [&](auto product) __attribute__((always_inline)) {
    T c[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) c[v] = load<T>(words + v * lanes);
#pragma GCC unroll 8
    for (int g = 0; g < BASES; ++g) {
#pragma GCC unroll 8
      for (int e = 0; e < 4; ++e) product(acc[g % 2][g / 2 * 4 + e], base[g] + e * column, c);
    }
  };
  const int64_t whole = contexts.steps() - contexts.half();
  for (int64_t s = 0; s < whole; ++s, words += contexts.step()) {
    if (fetches-- > 0) next.fetch();
    add([](auto& sum, const char* a, const auto& c) __attribute__((always_inline)) { Vector::add_word(sum, a, c); });
#pragma GCC unroll 8
    for (int g = 0; g < BASES; ++g) base[g] += 4;
  }
  ahead.at = next.at;
  if constexpr (W::PER == 2) {
    if (contexts.half())
      add([](auto& sum, const char* a, const auto& c)
              __attribute__((always_inline)) { Vector::add_element(sum, a, c); });
  }
#pragma GCC unroll 2
  for (int v = 0; v < vectors; ++v, to += kLaneWords<W> * lanes) {
#pragma GCC unroll 8
    for (int e = 0; e < COLUMNS; ++e) {
      if constexpr (W::PER == 1) {
        store(to + e * lanes, acc[0][e][v]), store(to + (2 * VL + e) * lanes, acc[1][e][v]);
      } else if constexpr (along_d) {
        store(to + e * lanes, Vector::pair(acc[0][e][v], acc[1][e][v]));
      } else if (e % 2 == 0) {
        store(to + e / 2 * lanes, Vector::pair(acc[0][e][v], acc[0][e + 1][v]));
        store(to + (VL + e / 2) * lanes, Vector::pair(acc[1][e][v], acc[1][e + 1][v]));
      }
    }
  }
}

// The same by so many vectors of so many lanes, `to` being that of context begin. from: the first word of `bilinear`.
template <class W, bool along_d, int lanes, int vectors>
inline void weights_by(const ContextLanes<W>& contexts, const char* from, int64_t row, int64_t column, int64_t begin,
                       int64_t end, const float* bias, char* to, int64_t context, int64_t half, Ahead& ahead,
                       int64_t fetches) {
  constexpr int64_t kColumns = lane_columns<W>(lanes, vectors),
                    kWord = W::PER == 2 && !along_d ? 2 : 1;  // columns of a tile and of a word
  alignas(64) float made[vectors * kLaneWords<W> * lanes];
  for (int64_t u = begin; u < end;) {
    for (int64_t j = 0; j < 2 * VL; j += kColumns) {
      const char* const first = from + j * column;
      lane_tile<W, along_d, lanes, vectors>(contexts, u, first, first + row, column, bias + j, made + j / kWord * lanes,
                                            ahead, u == begin ? fetches : 0);
    }
    for (const float* rest = made; rest < made + vectors * kLaneWords<W> * lanes; u += lanes, to += lanes * context) {
      for (int64_t v = 0; v < kLaneWords<W> / VL; ++v, rest += VL * lanes) {
        V rows[lanes];
        LaneVector<W, lanes>::turn(rest, rows);
        char* const there = to + (W::PER == 1 ? v / 2 * half + v % 2 * VL * 4 : along_d ? v * VL * 4 : v * half);
        if (end - u >= lanes) {
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) store(there + i * context, rows[i]);
        } else {
          for (int i = 0; i < end - u; ++i) store(there + i * context, rows[i]);
        }
      }
    }
  }
}

template <class W, bool along_d>
void lane_weights(const ContextLanes<W>& contexts, const Projection& p, int64_t d, int64_t e, int64_t begin,
                  int64_t end, const float* bias, char* to, int64_t context, int64_t half, Ahead& ahead,
                  int64_t fetches) {
  const int64_t size = size_of(W::dtype), row = p.bilinear.strides[0] * size, column = p.bilinear.strides[1] * size;
  const char* const from = p.bilinear.data + d * row + e * column;
  if (end - begin == 32)
    return weights_by<W, along_d, 16, 2>(contexts, from, row, column, begin, end, bias, to, context, half, ahead,
                                         fetches);
  const int64_t last = (end - begin) % 16, split = last == 7 || last == 8 ? end - last : end;
  weights_by<W, along_d, 16, 1>(contexts, from, row, column, begin, split, bias, to, context, half, ahead, fetches);
  weights_by<W, along_d, 8, 1>(contexts, from, row, column, split, end, bias, to + (split - begin) * context, context,
                               half, ahead, split == begin ? fetches : 0);
}

#endif

}  // namespace
}  // namespace ctxkern
