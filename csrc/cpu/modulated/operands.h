// The operands that all strips of a call share, each laid out once: x, dy and the contexts.
#pragma once

#include "../runtime/parallel.h"
#include "../runtime/row_pairs.h"
#include "call.h"

namespace ctxkern {
namespace {

// Of y, of all projections.
inline int64_t columns_of(const Call& q) {
  int64_t columns = 0;
  for (int i = 0; i < q.projections; ++i) columns += q.projection[i].d_out;
  return columns;
}

// Rows that are laid out at a time. Pieces of a context begin at multiples of the other, as words and steps of sums do.
constexpr int64_t kRowsAtOnce = 128, kRowsApart = 64;

// f(u, at, count): rows of context u from its row `at` on, all rows in pieces for threads to share.
template <class W, class F>
inline void pieces_of_rows(const Rows& rows, int64_t threads, F&& f) {
  static_assert(kRowsApart % (W::PER * W::STEP) == 0, "a piece ends where a step does");
  const int64_t pieces = (rows.count + kRowsAtOnce - 1) / kRowsAtOnce;
  parallel<W>(threads, pieces, [&](int64_t piece, int) {
    const int64_t begin = piece * kRowsAtOnce, end = begin + kRowsAtOnce;
    int64_t u = 0, after = rows.contexts;  // binary search for the context of the first row
    while (after - u > 1) {
      const int64_t middle = u + (after - u) / 2;
      (rows.first[middle] <= begin ? u : after) = middle;
    }
    for (; u < rows.contexts && rows.first[u] < end; ++u) {
      const int64_t count = rows.first[u + 1] - rows.first[u];
      const auto cut = [&](int64_t row) {
        const int64_t at = row <= rows.first[u] ? 0 : round_up(row - rows.first[u], kRowsApart);
        return at < count ? at : count;
      };
      if (cut(begin) < cut(end)) f(u, cut(begin), cut(end) - cut(begin));
    }
  });
}

// Rows of x (or y) of one context that lie together in a left operand.
struct Piece {
  int64_t left, count;  // row of the operand
  int64_t out;          // row of the output, where `map` is null
  const int64_t* map;
};

// Rows a run below which gathering rows beats products of few rows each (bench/LOG.md).
constexpr int64_t kShortRun = 32;

// Bytes of rows from which each pass finds them beyond the second cache, and how many rows ahead it asks for them then.
constexpr int64_t kCold = 4 << 20, kFarRows = 48;

// [N, columns] as a left operand: in place where it can be read so, packed in grouped order where not.
template <class W>
class LeftRows {
 public:
  LeftRows() = default;

  // in_place: `in_place_along` of what reads them; rows in another order than the contexts are packed even so
  LeftRows(const Call& q, const char* data, int64_t columns, bool in_place)
      : rows_(q.rows), source_(data), columns_(columns), dtype_(q.x.dtype) {
    const bool long_runs = rows_->count >= kShortRun * rows_->run_count();
    packed_ = q.x.dtype != W::dtype || (rows_->order && !long_runs) || !in_place;
  }

  // Whether rows of so many columns are read where they lie, for products of `made` columns: rows that share a set of the
  // first cache are copied where more panels than a few read them.
  static bool in_place_along(int64_t columns, int64_t made) {
    constexpr int64_t kOften = 8 * VL;
    return columns % (W::PER * W::STEP) == 0 && (columns * size_of(W::dtype) % kSets != 0 || made <= kOften);
  }

  void place(Arena& arena) { buffer_ = packed_ ? arena.take(rows_->count * step_words() + 2 * VL) : nullptr; }

  // Rows of context u, as `pieces_of_rows` has them.
  void pack(int64_t u, int64_t at, int64_t count) const {
    if (!packed_) return;
    const int64_t begin = rows_->first[u] + at, row = columns_ * size_of(dtype_);
    const int64_t* const map = rows_->order ? rows_->order + begin : nullptr;
    with_source<W>(dtype_, [&](auto type) {
      pack_left<W, decltype(type)::value>(buffer_ + begin * step_words(), source_ + (map ? 0 : begin * row), row, count,
                                          columns_, map, step_words());
    });
  }

  Left at(int64_t row) const {
    const char* const base = packed_ ? reinterpret_cast<const char*>(buffer_) : source_;
    const int64_t far = rows_->count * row_bytes() < kCold ? 0 : kFarRows * row_bytes();
    return {base + row * row_bytes(), row_bytes(), 4, far};
  }

  template <class F>
  void pieces(int64_t u, F&& f) const {
    const Rows& rows = *rows_;
    const int64_t begin = rows.first[u];
    if (!rows.order) return f(Piece{begin, rows.first[u + 1] - begin, begin, nullptr});
    if (packed_) return f(Piece{begin, rows.first[u + 1] - begin, 0, rows.order + begin});
    for (int64_t i = rows.run_first[u]; i < rows.run_first[u + 1]; ++i) {
      f(Piece{rows.runs[i].row, rows.runs[i].count, rows.runs[i].row, nullptr});
    }
  }

  bool packed() const { return packed_; }
  int64_t row_bytes() const { return packed_ ? step_words() * 4 : columns_ * size_of(dtype_); }

 private:
  int64_t step_words() const {
    const int64_t count = words<W>(columns_);
    return count * 4 % kSets == 0 ? count + 16 : count;
  }

  const Rows* rows_ = nullptr;
  const char* source_ = nullptr;
  int64_t columns_ = 0;
  Dtype dtype_ = Dtype::f32;
  bool packed_ = false;
  float* buffer_ = nullptr;
};

// Columns c to c + columns of rows that were summed in float32, [rows of a left operand, step], in the dtype of x.
inline void write_rows(const Call& q, const Piece& piece, const float* sums, int64_t step, char* to, int64_t width,
                       int64_t c, int64_t columns) {
  const int64_t size = size_of(q.x.dtype);
  with_dtype(q.x.dtype, [&](auto type) {
    for (int64_t r = 0; r < piece.count; ++r) {
      const float* const from = sums + (piece.left + r) * step;
      char* const row = to + ((piece.map ? piece.map[r] : piece.out + r) * width + c) * size;
      for (int64_t j = 0; j < columns; j += VL)
        store_as_first<decltype(type)::value>(row + j * size, load<V>(from + j), columns - j);
    }
  });
}

// [N, columns] as words along the rows of each context, in panels [words of its rows, NR lanes] of columns: an operand,
// left or right, of a product over rows. Read in place, rows a power of two apart would push each other out of cache.
template <class W>
class RowWords {
 public:
  static constexpr int64_t NR = 2 * VL;

  RowWords() = default;

  RowWords(const Call& q, const char* data, int64_t columns)
      : rows_(q.rows), source_(data), columns_(columns), dtype_(q.x.dtype) {}

  void place(Arena& arena) { buffer_ = arena.take(bytes() / 4); }

  int64_t bytes() const { return first(rows_->contexts) * round_up(columns_, NR) * 4; }

  // The same, row after row, as memory brings them.
  void pack(int64_t u, int64_t at, int64_t count) const {
    const int64_t begin = rows_->first[u] + at, size = size_of(dtype_), row = columns_ * size;
    const int64_t* const map = rows_->order ? rows_->order + begin : nullptr;
    with_source<W>(dtype_, [&](auto type) {
      pack_rows<W, decltype(type)::value>(panel(u, 0) + at / W::PER * NR, NR, source_ + (map ? 0 : begin * row), row,
                                          size, count, columns_, map, steps(u) * NR);
    });
  }

  // Whether they lie beyond the second cache.
  bool cold() const { return bytes() >= kCold; }

  // Bytes from a panel to that of the next context.
  int64_t far(int64_t u, int64_t c) const { return (panel(u + 1, c / NR * NR) - panel(u, c / NR * NR)) * 4; }

  int64_t steps(int64_t u) const { return words<W>(rows_->first[u + 1] - rows_->first[u]); }

  // The panel from column c on, a multiple of NR.
  float* panel(int64_t u, int64_t c) const { return buffer_ + first(u) * round_up(columns_, NR) + c * steps(u); }

 private:
  // Room for the last word of every context to be half full.
  int64_t first(int64_t u) const { return rows_->first[u] / W::PER + u * W::STEP; }

  const Rows* rows_ = nullptr;
  const char* source_ = nullptr;
  int64_t columns_ = 0;
  Dtype dtype_ = Dtype::f32;
  float* buffer_ = nullptr;
};

// The contexts in use: words along K, [U, words of K], a left operand; for a backward words along U, [words of U, K padded].
template <class W>
struct Contexts {
  Contexts(const Call& q, bool along_contexts)
      : along_k_words(words<W>(q.context_dim)), lanes(round_up(q.context_dim, VL)), both(along_contexts) {}

  void place(const Call& q, Arena& arena) {
    const int64_t count = q.rows->contexts;
    along_k = arena.take(count * along_k_words);
    along_u = both ? arena.take(round_up(words<W>(count), 16) * lanes) : nullptr;
  }

  void pack(const Call& q) const {
    const int64_t size = size_of(q.context.dtype), row = q.context_dim * size, count = q.rows->contexts;
    with_source<W>(q.context.dtype, [&](auto type) {
      constexpr Dtype D = decltype(type)::value;
      const int64_t* const slots = q.rows->slot;
      pack_left<W, D>(along_k, q.context.data, row, count, q.context_dim, slots);
      if (both) pack_rows<W, D>(along_u, lanes, q.context.data, row, size, count, q.context_dim, slots);
    });
  }

  Left left(int64_t u) const {
    const int64_t row = along_k_words * 4;
    return {reinterpret_cast<const char*>(along_k) + u * row, row, 4};
  }

  // u a multiple of the elements a word holds (and of a sum's padding)
  Right right(int64_t u) const { return {along_u + u / W::PER * lanes, lanes}; }

  int64_t along_k_words, lanes;
  bool both;
  float* along_k = nullptr;
  float* along_u = nullptr;
};

// A row pair of D and a column of E. `after`: what follows it where columns `first` to `end` are taken `step` at a time.
struct Place {
  int64_t d, e;

  Place after(int64_t step, int64_t first, int64_t end) const {
    return e + step < end ? Place{d, e + step} : Place{d + 2, first};
  }
};

// What `weight_panel` would read of `columns` columns from a place on, where it lies dense; far: those of the place `then`.
inline Ahead panel_ahead(const Call& q, const Projection& p, Place at, Place then, int64_t columns) {
  Ahead next;
  const auto& strides = p.bilinear.strides;
  if (at.d >= q.d_in || at.e >= p.d_out || strides[2] != 1 || strides[1] != q.context_dim) return next;
  const int64_t size = size_of(p.bilinear.dtype), there = p.d_out - at.e < columns ? p.d_out - at.e : columns;
  next.bytes = there * q.context_dim * size;
  next.far = ((then.d - at.d) * strides[0] + (then.e - at.e) * strides[1]) * size;
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t row = at.d + i < q.d_in ? at.d + i : at.d;
    next.from[i] = p.bilinear.data + (row * strides[0] + at.e * strides[1]) * size;
  }
  return next;
}

// Blocks that `weight_panel` turns for `panels` panels.
template <class W>
inline int64_t blocks_of(const Call& q, int64_t panels) {
  return panels * 4 * (round_up(words<W>(q.context_dim), VL) / VL);
}

// `weight` alone where contexts change nothing of it: rows d to d + rows, columns e to e + columns as panels of 2·VL lanes,
// [words of rows, lanes] at the beginning of `depth` words each.
template <class W>
inline void lay_out_weight(const Projection& p, int64_t d, int64_t rows, int64_t e, int64_t columns, float* to,
                           int64_t depth) {
  constexpr int64_t NR = 2 * VL;
  const int64_t size = size_of(p.weight.dtype), row = p.weight.strides[0] * size, column = p.weight.strides[1] * size;
  with_source<W>(p.weight.dtype, [&](auto type) {
    constexpr Dtype D = decltype(type)::value;
    for (int64_t j = 0; j < columns; j += NR) {
      const char* const from = p.weight.data + d * row + (e + j) * column;
      pack_matrix<W, D>(to + j * depth, from, row, column, rows, columns - j < NR ? columns - j : NR);
    }
  });
}

// How many rows of weight ahead a panel asks for its columns, a line or two of a row at a time.
constexpr int64_t kWeightRows = 8;

// Rows d and d + 1 of weight, columns e to e + 2·VL each, in float32; zeros where there are none.
inline void panel_bias(const Call& q, const Projection& p, int64_t d, int64_t e, float* bias) {
  const int64_t columns = p.d_out - e < 2 * VL ? p.d_out - e : 2 * VL, size = size_of(p.weight.dtype);
  const auto& strides = p.weight.strides;
  for (int64_t i = 0; i < 2; ++i) {
    const bool weighted = d + i < q.d_in && p.weight.data;
    const char* const from = p.weight.data + (weighted ? ((d + i) * strides[0] + e * strides[1]) * size : 0);
    if (weighted && strides[1] == 1 && d + i + kWeightRows < q.d_in) {
      const char* const later = from + kWeightRows * strides[0] * size;
      for (const int64_t at : {int64_t{0}, columns * size - 1}) __builtin_prefetch(later + at, 0, 2);
    }
    pack_vector(bias + i * 2 * VL, p.weight.dtype, from, weighted ? strides[1] : 1, weighted ? columns : 0, 2 * VL);
  }
}

// A panel of `bilinear` for the product that makes weights: rows d and d + 1, columns e to e + 2·VL, as
// [words of K, 4·VL lanes], and `bias`: those of weight. Lanes that are not there are zeros.
template <class W>
inline void weight_panel(const Call& q, const Projection& p, int64_t d, int64_t e, float* panel, float* bias,
                         Ahead* ahead) {
  const int64_t steps = words<W>(q.context_dim);
  const int64_t columns = p.d_out - e < 2 * VL ? p.d_out - e : 2 * VL;
  for (int64_t i = 0; i < 2; ++i) {
    const bool there = d + i < q.d_in;
    with_source<W>(p.bilinear.dtype, [&](auto type) {
      constexpr Dtype D = decltype(type)::value;
      const int64_t size = size_of(D);
      const char* const from = p.bilinear.data + ((d + i) * p.bilinear.strides[0] + e * p.bilinear.strides[1]) * size;
      if (there) {
        pack_lanes<W, D>(panel + i * 2 * VL, 4 * VL, from, p.bilinear.strides[1] * size, p.bilinear.strides[2] * size,
                         columns, q.context_dim, ahead);
      } else {
        for (int64_t s = 0; s < steps; ++s)
          store(panel + s * 4 * VL + 2 * VL, V{}), store(panel + s * 4 * VL + 3 * VL, V{});
      }
    });
  }
  panel_bias(q, p, d, e, bias);
}

// Columns of a row of `bilinear`, [columns, K], as the right operand of sums over them, lanes padded to vectors.
struct RowOperand {
  bool paired;
  RowPairs pairs;
  Right right;  // where it is not paired
};

// Columns e and on of row d. paired: whether pairs are read where they lie, if products take them; to: where they are laid
// out if not, or if words do not lie there.
template <class W>
inline RowOperand row_operand(const Call& q, const Projection& p, int64_t d, int64_t e, int64_t columns, bool paired,
                              float* to) {
  const int64_t size = size_of(p.bilinear.dtype), column = p.bilinear.strides[1] * size,
                lanes = round_up(q.context_dim, VL);
  const char* const from = p.bilinear.data + d * p.bilinear.strides[0] * size + e * column;
  const bool words_lie = p.bilinear.dtype == W::dtype && p.bilinear.strides[2] == 1;
  if (kTakesRowPairs<W> && paired && words_lie) return {true, {from, column, columns}, {}};
  if (W::PER == 1 && words_lie && q.context_dim % VL == 0)
    return {false, {}, {reinterpret_cast<const float*>(from), p.bilinear.strides[1]}};
  with_source<W>(p.bilinear.dtype, [&](auto type) {
    pack_rows<W, decltype(type)::value>(to, lanes, from, column, p.bilinear.strides[2] * size, columns, q.context_dim);
  });
  return {false, {}, {to, lanes}};
}

}  // namespace
}  // namespace ctxkern
