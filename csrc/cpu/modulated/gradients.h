// What the backward takes from G_u[d, :], the gradient of one row of every context's weight:
//
//   dbilinear[d, e, k] = Σ_u G_u[d, e] c[u, k]    dweight[d, e] = Σ_u G_u[d, e]    dcontext[u, k] += Σ_e bilinear[d, e, k] G_u[d, e]
#pragma once

#include "../runtime/sums.h"
#include "operands.h"

namespace ctxkern {
namespace {

// Columns of E at a time: a piece of a row of `bilinear` stays in cache between the products that read it.
template <class W>
constexpr int64_t kChunk = 128 * W::PER;
// Ranges of D whose sums for dcontext are kept apart, at most: that many threads can share a backward.
constexpr int64_t kRanges = 64;
// Contexts whose sum is begun apart, as rounding grows with the length of a sum.
constexpr int64_t kFewContexts = 32;

// Rows d to d + rows and columns e to e + columns of a projection's weight, of contexts begin to end.
struct Block {
  int64_t d, rows, e, columns, begin, end;
};

inline bool needs_products(const Call& q) {
  bool needed = q.dcontext != nullptr;
  for (int i = 0; i < q.projections; ++i)
    needed = needed || q.projection[i].dweight.data || q.projection[i].dbilinear.data;
  return needed;
}

inline int64_t range_bytes(const Call& q) {
  return q.dcontext ? q.rows->contexts * round_up(q.context_dim, VL) * 4 : 0;
}

// As many as a quarter of the budget holds; a few in any case, for threads to share and for sums that stay short.
inline int64_t ranges_for(const Call& q, int64_t units) {
  constexpr int64_t kFew = 4;
  const int64_t each = range_bytes(q);
  int64_t ranges = each > 0 ? q.workspace_bytes / 4 / each : kRanges;
  ranges = ranges < kFew ? kFew : ranges > kRanges ? kRanges : ranges;
  return ranges < units ? ranges : units > 1 ? units : 1;
}

inline int64_t threads_for(const Call& q, int64_t bytes_each, int64_t ranges) {
  int64_t threads = q.threads < ranges ? q.threads : ranges;
  if (bytes_each > 0 && threads > q.workspace_bytes / bytes_each) threads = q.workspace_bytes / bytes_each;
  return threads > 1 ? threads : 1;
}

// Whether dbilinear is so large that it is written past the cache.
inline bool past_cache(const Call& q, const Projection& p) {
  return VL > 4 && q.d_in * p.d_out * q.context_dim * size_of(p.dbilinear.dtype) >= kCached;
}

// Rows of dbilinear as a product. Four vectors of a row at once where there are registers for them.
template <class W>
inline void product_of_rows(int64_t rows, int64_t steps, const Left& left, const Right& right, Out& out, bool past) {
  if (past && streamable(out)) out = streamed(out);
  if (!by_four<W>(out.lanes)) return product_wide<W>(rows, steps, left, right, out);
  out.half = 2 * VL * size_of(out.store);
  for (int64_t k = 0; k < out.lanes; k += 4 * VL) product<W, 4>(rows, steps, left, right, out, k);
}

// Sums for dcontext, one a range, [ranges, U, K padded], added in their order at the end.
class DContext {
 public:
  void place(const Call& q, int64_t ranges, Arena& arena) {
    lanes_ = round_up(q.context_dim, VL);
    size_ = q.rows->contexts * lanes_;
    ranges_ = ranges;
    sums_ = q.dcontext ? arena.take(ranges * size_) : nullptr;
  }

  void clear() const {
    if (sums_) std::memset(sums_, 0, static_cast<size_t>(ranges_ * size_) * 4);
  }

  // [U, K padded], null where not asked for
  float* at(int64_t range) const { return sums_ ? sums_ + range * size_ : nullptr; }

  void write(const Call& q) const {
    if (!sums_) return;
    const int64_t size = size_of(q.context.dtype), row = q.context_dim * size;
    if (q.rows->contexts < q.batch.table) std::memset(q.dcontext, 0, static_cast<size_t>(q.batch.table * row));
    for (int64_t u = 0; u < q.rows->contexts; ++u) {
      char* const to = q.dcontext + q.rows->slot[u] * row;
      for (int64_t k = 0; k < q.context_dim; k += VL) {
        V total = load<V>(at(0) + u * lanes_ + k);
        for (int64_t range = 1; range < ranges_; ++range) total += load<V>(at(range) + u * lanes_ + k);
        with_dtype(q.context.dtype,
                   [&](auto type) { store_as_first<decltype(type)::value>(to + k * size, total, q.context_dim - k); });
      }
    }
  }

 private:
  float* sums_ = nullptr;
  int64_t lanes_ = 0, size_ = 0, ranges_ = 0;
};

// G_u[d, e...] of contexts begin to begin + count, in the dtype of words, `context` bytes apart.
struct Products {
  const char* data;
  int64_t context, begin, count;
};

// Sums over groups of contexts, [columns] and [columns, K padded]; null where one group is all.
struct Sums {
  float *dweight = nullptr, *dbilinear = nullptr;
  bool started = false, last = true;
};

struct RowScratch {
  float *rows, *pairs, *out;
};

template <class W>
class RowGradients {
 public:
  // columns: at most so many at a time; group: contexts, likewise
  RowGradients(const Call& q, const Contexts<W>& contexts, int64_t columns, int64_t group)
      : q_(q), contexts_(contexts), columns_(round_up(columns, 2 * VL)), group_(group) {}

  void place(Arena& arena, RowScratch& at) const {
    at.rows = arena.take(words<W>(columns_) * contexts_.lanes);
    at.pairs = W::PER == 2 ? arena.take(words<W>(group_) * columns_) : nullptr;
    at.out = arena.take(columns_ * (contexts_.lanes + 1));
  }

  void add(const Projection& p, int64_t d, int64_t e, int64_t columns, const Products& g, float* dcontext,
           const Sums& sums, const RowScratch& at) const {
    if (dcontext) add_dcontext(p, d, e, columns, g, dcontext, at);
    if (!p.dweight.data && !p.dbilinear.data) return;
    Left turned{g.data, 4, g.context};
    if (W::PER == 2) {
      pack_rows<W, W::dtype>(at.pairs, columns_, g.data, g.context, 2, g.count, columns);
      turned = {reinterpret_cast<const char*>(at.pairs), 4, columns_ * 4};
    }
    if (p.dweight.data) add_dweight(p, d, e, columns, g.count, turned, sums, at);
    if (p.dbilinear.data) add_dbilinear(p, d, e, columns, g, turned, sums, at);
  }

 private:
  void add_dcontext(const Projection& p, int64_t d, int64_t e, int64_t columns, const Products& g, float* dcontext,
                    const RowScratch& at) const {
    const Left left{g.data, g.context, 4};
    const RowOperand row = row_operand<W>(q_, p, d, e, columns, true, at.rows);
    const Out out{reinterpret_cast<char*>(dcontext + g.begin * contexts_.lanes), contexts_.lanes * 4, Store::f32_add,
                  row.paired ? q_.context_dim : contexts_.lanes};
    if constexpr (kTakesRowPairs<W>) {
      if (row.paired) return product_of_row_pairs<W>(g.count, left, row.pairs, out);
    }
    product_wide<W>(g.count, words<W>(columns), left, row.right, out);
  }

  // turned: words along the contexts, a row for each column
  void add_dweight(const Projection& p, int64_t d, int64_t e, int64_t columns, int64_t count, const Left& turned,
                   const Sums& sums, const RowScratch& at) const {
    constexpr int64_t few = kFewContexts / W::PER;
    const int64_t steps = (count + W::PER - 1) / W::PER, out_size = size_of(p.dweight.dtype);
    float* const kept = sums.dweight ? sums.dweight : at.out;
    for (int64_t j = 0; j < columns; j += VL) {
      V total = sums.started ? load_f32_first<Dtype::f32>(reinterpret_cast<char*>(kept + j), columns - j) : V{};
      // a few contexts first: rounding grows with the length of a sum
      for (int64_t s = 0; s < steps;) {
        V part{};
        for (const int64_t end = steps - s < few ? steps : s + few; s < end; ++s) {
          const char* const from = turned.data + s * turned.step + j * 4;
          if constexpr (W::PER == 2) {
            const VU both = load<VU>(from);
            part += (V)(both << 16) + (V)(both & 0xffff0000u);
          } else {
            part += load_f32_first<Dtype::f32>(from, columns - j);
          }
        }
        total += part;
      }
      store_as_first<Dtype::f32>(reinterpret_cast<char*>(kept + j), total, columns - j);
    }
    if (sums.last) {
      write_vector(p.dweight.dtype, p.dweight.data + (d * p.dweight.strides[0] + e * p.dweight.strides[1]) * out_size,
                   p.dweight.strides[1], kept, columns);
    }
  }

  void add_dbilinear(const Projection& p, int64_t d, int64_t e, int64_t columns, const Products& g, const Left& left,
                     const Sums& sums, const RowScratch& at) const {
    const int64_t steps = words<W>(g.count), size = size_of(p.dbilinear.dtype);
    char* const to = p.dbilinear.data + (d * p.dbilinear.strides[0] + e * p.dbilinear.strides[1]) * size;
    const bool whole = W::PER == 2 || steps <= kLongest;
    if (whole && !sums.dbilinear && p.dbilinear.strides[2] == 1) {
      Out out{to, p.dbilinear.strides[1] * size, store_of(p.dbilinear.dtype), q_.context_dim};
      const bool past = past_cache(q_, p);
      // rows without gaps that cannot be written past the cache by whole lines go through it
      const bool copied = past && !streams_lines(out) && p.dbilinear.strides[1] == q_.context_dim;
      if (copied) out.data = reinterpret_cast<char*>(at.out) + reinterpret_cast<uintptr_t>(to) % 64;
      product_of_rows<W>(columns, steps, left, contexts_.right(g.begin), out, past && !copied);
      if (copied) stream_copy(to, out.data, columns * out.row);
      return;
    }
    float* const kept = sums.dbilinear ? sums.dbilinear : at.out;
    product_in_pieces<W>(columns, contexts_.lanes, steps, kLongest, left, contexts_.right(g.begin), kept,
                         contexts_.lanes, sums.started);
    for (int64_t j = 0; sums.last && j < columns; ++j) {
      write_vector(p.dbilinear.dtype, to + j * p.dbilinear.strides[1] * size, p.dbilinear.strides[2],
                   kept + j * contexts_.lanes, q_.context_dim);
    }
  }

  const Call& q_;
  const Contexts<W>& contexts_;
  int64_t columns_, group_;
};

// x and dy as the backward's products read them.
template <class W>
struct SharedRows {
  static constexpr int64_t NR = 2 * VL;

  SharedRows(const Call& q, bool products)
      : need_products(products), need_dx(q.dx != nullptr), count(q.projections), x_words(q, q.x.data, q.d_in) {
    // in place all or none, so that one numbering of rows serves them
    bool whole = true;
    for (int i = 0; i < count; ++i) whole = whole && LeftRows<W>::in_place_along(q.projection[i].d_out, q.d_in);
    for (int i = 0; i < count; ++i) {
      const Projection& p = q.projection[i];
      dy[i] = LeftRows<W>(q, p.rows, p.d_out, whole);
      dy_words[i] = RowWords<W>(q, p.rows, p.d_out);
    }
  }

  void place(Arena& arena) {
    if (need_products) x_words.place(arena);
    for (int i = 0; i < count; ++i) {
      if (need_dx) dy[i].place(arena);
      if (need_products) dy_words[i].place(arena);
    }
  }

  void pack(int64_t u, int64_t at, int64_t rows) const {
    if (need_products) x_words.pack(u, at, rows);
    for (int i = 0; i < count; ++i) {
      if (need_dx) dy[i].pack(u, at, rows);
      if (need_products) dy_words[i].pack(u, at, rows);
    }
  }

  // G_u of a block
  void products(int i, int64_t u, const Block& b, const Out& out) const {
    const float* const right = dy_words[i].panel(u, b.e);
    // in float32 a long sum is cut, as its rounding grows with its length; a half is rounded far more in the end
    const int64_t steps = x_words.steps(u), longest = out.store == Store::f32 ? kLongest : steps;
    const int64_t far = dy_words[i].cold() ? steps * NR : 0;  // the next panel
    for (int64_t r = 0; r < b.rows; r += NR) {
      const float* const left = x_words.panel(u, (b.d + r) / NR * NR) + (b.d + r) % NR;
      const int64_t later = u + 1 < b.end ? x_words.far(u, b.d + r) : 0;
      Out part = out;
      part.data += r * out.row;
      for (int64_t s = 0; s == 0 || s < steps; s += longest > 0 ? longest : 1) {
        const int64_t piece = steps - s < longest ? steps - s : longest;
        product_wide<W>(b.rows - r < NR ? b.rows - r : NR, piece,
                        {reinterpret_cast<const char*>(left + s * NR), 4, NR * 4, later},
                        {right + s * NR, NR, steps * NR, far}, part);
        part.store = Store::f32_add;
      }
    }
  }

  bool need_products, need_dx;
  int count;
  LeftRows<W> dy[kMaxProjections];
  RowWords<W> x_words, dy_words[kMaxProjections];
};

}  // namespace
}  // namespace ctxkern
