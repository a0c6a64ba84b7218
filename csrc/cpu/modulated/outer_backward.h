// The backward of an outer form (outer.h).
#pragma once

#include "gradients.h"
#include "outer.h"

namespace ctxkern {
namespace {

// Rows of x and dy that a sum over n takes at a time; columns of dbilinear that are one thread's work.
constexpr int64_t kSummed = 256, kColumns = 4;
// Rows of dy up to which `bilinear` is read where it lies: each few of them make its words again (bench/LOG.md).
constexpr int64_t kFewPaired = 48;

template <class W>
struct OuterBackward {
  static constexpr int64_t NR = 2 * VL;

  static Tiles tiles(const Call& q) {
    // few rows of D at a time where there are few
    int64_t strip = NR;
    while (strip > 4 && (q.d_in + strip - 1) / strip < 16) strip /= 2;
    Tiles t{strip, 0, q.rows->count, 1, 1, 0, 0};
    t.ranges = ranges_for(q, (q.d_in + strip - 1) / strip);
    t.threads = threads_for(q, 0, t.ranges);
    t.weights_bytes = t.ranges * range_bytes(q);
    t.bytes = OuterBackward(q, t, nullptr).bytes;
    return t;
  }

  OuterBackward(const Call& problem, const Tiles& tiles, char* workspace)
      : q(problem), t(tiles), all(problem), x(all.whole, problem.x.data, problem.d_in) {
    Arena arena(workspace);
    all.place(arena);
    for (int i = 0; i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      dy[i] = LeftRows<W>(all.whole, p.rows, p.d_out, LeftRows<W>::in_place_along(p.d_out, q.d_in));
      if (need_z()) dy[i].place(arena);
      need_weight = need_weight || p.dweight.data;
      need_bilinear = need_bilinear || p.dbilinear.data;
      widest = p.d_out > widest ? p.d_out : widest;
      if (p.dweight.data) {
        dy_words[i] = RowWords<W>(all.whole, p.rows, p.d_out);
        dy_words[i].place(arena);
      }
    }
    if (need_weight || need_bilinear) x.place(arena);
    dcontext.place(q, t.ranges, arena);
    Arena one(nullptr);
    place(one, Thread{});
    each_thread = one.used();
    threads = arena.take<char>(each_thread * t.threads);
    bytes = arena.used();
  }

  struct Thread {
    float *right, *z, *dx, *out;
  };

  Thread place(Arena& arena, Thread at) const {
    const auto most = [](int64_t a, int64_t b) { return a > b ? a : b; };
    const int64_t chunk = words<W>(widest < kChunk<W> ? widest : kChunk<W>) * NR, row = words<W>(widest) * all.lanes;
    at.right = arena.take(most(most(row, chunk), words<W>(kSummed) * all.lanes));
    at.z = arena.take(kRows * all.lanes);
    at.dx = arena.take(q.rows->count * t.strip + NR);
    at.out = arena.take(most(q.d_in * all.lanes, t.strip * round_up(widest, NR)));
    return at;
  }

  void run() {
    const int64_t strips = (q.d_in + t.strip - 1) / t.strip;
    if (q.dx || need_bilinear) all.pack();
    dcontext.clear();
    pieces_of_rows<W>(*all.whole.rows, t.threads, [&](auto... piece) {
      if (need_weight || need_bilinear) x.pack(piece...);
      for (int i = 0; i < q.projections; ++i) {
        if (need_z()) dy[i].pack(piece...);
        if (q.projection[i].dweight.data) dy_words[i].pack(piece...);
      }
    });
    parallel<W>(t.threads, t.ranges, [&](int64_t range, int thread) {
      Arena arena(threads + thread * each_thread);
      const Thread at = place(arena, Thread{});
      for (int64_t s = strips * range / t.ranges; s < strips * (range + 1) / t.ranges; ++s)
        strip(s * t.strip, range, at);
    });
    dcontext.write(q);
    int64_t first[kMaxProjections + 1] = {0};
    for (int i = 0; i < q.projections; ++i) {
      first[i + 1] =
          first[i] + (q.projection[i].dbilinear.data ? (q.projection[i].d_out + kColumns - 1) / kColumns : 0);
    }
    parallel<W>(t.threads, first[q.projections], [&](int64_t unit, int thread) {
      Arena arena(threads + thread * each_thread);
      const Thread at = place(arena, Thread{});
      int i = 0;
      while (unit >= first[i + 1]) ++i;
      const int64_t e = (unit - first[i]) * kColumns, end = q.projection[i].d_out;
      for (int64_t j = e; j < e + kColumns && j < end; ++j) add_dbilinear(i, j, at);
    });
  }

  // Products of dy with `bilinear`.
  bool need_z() const { return q.dx || q.dcontext; }

  void strip(int64_t d, int64_t range, const Thread& at) const {
    const int64_t rows = q.d_in - d < t.strip ? q.d_in - d : t.strip;
    if (q.dx) std::memset(at.dx, 0, static_cast<size_t>(q.rows->count * t.strip) * 4);
    for (int i = 0; i < q.projections; ++i) {
      if (q.dx && q.projection[i].weight.data) shared_weight(i, d, rows, at);
      for (int64_t r = 0; need_z() && r < rows; ++r) contract(i, d, r, rows, range, at);
      if (q.projection[i].dweight.data) add_dweight(i, d, rows, at);
    }
    if (q.dx) write_rows(q, {0, q.rows->count, 0, q.rows->order}, at.dx, t.strip, q.dx, q.d_in, d, rows);
  }

  // dx[:, d...] += dy weight[d...]^T
  void shared_weight(int i, int64_t d, int64_t rows, const Thread& at) const {
    const Projection& p = q.projection[i];
    const int64_t size = size_of(p.weight.dtype);
    for (int64_t e = 0; e < p.d_out; e += kChunk<W>) {
      const int64_t columns = p.d_out - e < kChunk<W> ? p.d_out - e : kChunk<W>;
      with_source<W>(p.weight.dtype, [&](auto type) {
        pack_lanes<W, decltype(type)::value>(at.right, NR,
                                             p.weight.data + (d * p.weight.strides[0] + e * p.weight.strides[1]) * size,
                                             p.weight.strides[0] * size, p.weight.strides[1] * size, rows, columns);
      });
      Left left = dy[i].at(0);
      left.data += e / W::PER * 4;
      const Out out{reinterpret_cast<char*>(at.dx), t.strip * 4, Store::f32_add, rows};
      product_wide<W>(q.rows->count, words<W>(columns), left, {at.right, NR}, out);
    }
  }

  // The row of `bilinear` after row d, and the one that follows it, where a row lies together. left: rows of this strip
  // after row d.
  Ahead row_ahead(const Projection& p, int64_t d, int64_t left) const {
    Ahead next;
    if (left == 0 || p.bilinear.strides[2] != 1 || p.bilinear.strides[1] != q.context_dim) return next;
    const int64_t size = size_of(p.bilinear.dtype), row = p.bilinear.strides[0] * size;
    next.bytes = (p.d_out * q.context_dim * size + 1) / 2;
    next.from[0] = p.bilinear.data + (d + 1) * row;
    next.from[1] = next.from[0] + next.bytes;
    next.far = left > 1 ? row : 0;
    return next;
  }

  // Z of row d + r, and what dx and dcontext take from it; `strip` rows from d on are this strip's.
  void contract(int i, int64_t d, int64_t r, int64_t strip, int64_t range, const Thread& at) const {
    const Projection& p = q.projection[i];
    const int64_t count = q.rows->count;
    const RowOperand row = row_operand<W>(q, p, d + r, 0, p.d_out, count <= kFewPaired, at.right);
    Ahead next = row_ahead(p, d + r, strip - r - 1);
    int64_t u = 0;
    for (int64_t n = 0; n < count; n += kRows) {
      const int64_t rows = count - n < kRows ? count - n : kRows;
      const Left left = dy[i].at(n);
      if constexpr (kTakesRowPairs<W>) {
        const Out out{reinterpret_cast<char*>(at.z), all.lanes * 4, Store::f32, q.context_dim};
        if (row.paired) product_of_row_pairs<W>(rows, left, row.pairs, out, &next);
      }
      if (!row.paired)
        product_in_pieces<W>(rows, all.lanes, words<W>(p.d_out), kDeepest, left, row.right, at.z, all.lanes, false,
                             &next);
      for (int64_t m = 0; q.dx && m < rows; ++m) {
        V total{};
        for (int64_t k = 0; k < all.lanes; k += VL) total += all.context(n + m, k) * load<V>(at.z + m * all.lanes + k);
        at.dx[(n + m) * t.strip + r] += sum(total);
      }
      if (!q.dcontext) continue;
      with_dtype(q.x.dtype, [&](auto type) {
        for (int64_t m = 0; m < rows; ++m) {
          while (n + m >= q.rows->first[u + 1]) ++u;
          float* const to = dcontext.at(range) + u * all.lanes;
          const V scale = splat(element<decltype(type)::value>(q.x.data, n + m, q.d_in, d + r));
          for (int64_t k = 0; k < all.lanes; k += VL)
            store(to + k, load<V>(to + k) + scale * load<V>(at.z + m * all.lanes + k));
        }
      });
    }
  }

  // Of x or dy, by grouped row.
  template <Dtype D>
  float element(const char* data, int64_t n, int64_t columns, int64_t c) const {
    return load_scalar(D, data + ((q.rows->order ? q.rows->order[n] : n) * columns + c) * size_of(D));
  }

  Left x_left(int64_t d, int64_t step) const {
    return {reinterpret_cast<const char*>(x.panel(0, d / NR * NR) + d % NR + step * NR), 4, NR * 4};
  }

  void add_dweight(int i, int64_t d, int64_t rows, const Thread& at) const {
    const Projection& p = q.projection[i];
    const int64_t width = round_up(p.d_out, NR), size = size_of(p.dweight.dtype);
    for (int64_t e = 0; e < p.d_out; e += NR) {
      Out out{reinterpret_cast<char*>(at.out + e), width * 4, Store::f32, p.d_out - e < NR ? p.d_out - e : NR};
      for (int64_t n = 0; n == 0 || n < q.rows->count; n += kSummed) {
        const int64_t summed = q.rows->count - n < kSummed ? q.rows->count - n : kSummed;
        product_wide<W>(rows, words<W>(summed), x_left(d, n / W::PER), {dy_words[i].panel(0, e) + n / W::PER * NR, NR},
                        out);
        out.store = Store::f32_add;
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      write_vector(p.dweight.dtype, p.dweight.data + (d + r) * p.dweight.strides[0] * size, p.dweight.strides[1],
                   at.out + r * width, p.d_out);
    }
  }

  // Column e of `bilinear`, all rows.
  void add_dbilinear(int i, int64_t e, const Thread& at) const {
    const Projection& p = q.projection[i];
    const int64_t count = q.rows->count, size = size_of(p.dbilinear.dtype);
    const bool direct = count <= kSummed && p.dbilinear.strides[2] == 1;
    char* const to = p.dbilinear.data + e * p.dbilinear.strides[1] * size;
    for (int64_t n = 0; n == 0 || n < count; n += kSummed) {
      const int64_t summed = count - n < kSummed ? count - n : kSummed;
      with_dtype(q.x.dtype, [&](auto type) { gated_contexts<decltype(type)::value>(i, e, n, summed, at.right); });
      for (int64_t d = 0; d < q.d_in; d += NR) {
        const int64_t rows = q.d_in - d < NR ? q.d_in - d : NR;
        Out out{reinterpret_cast<char*>(at.out + d * all.lanes), all.lanes * 4, n > 0 ? Store::f32_add : Store::f32,
                all.lanes};
        if (direct)
          out = Out{to + d * p.dbilinear.strides[0] * size, p.dbilinear.strides[0] * size, store_of(p.dbilinear.dtype),
                    q.context_dim};
        product_of_rows<W>(rows, words<W>(summed), x_left(d, n / W::PER), {at.right, all.lanes}, out,
                           direct && past_cache(q, p));
      }
    }
    for (int64_t d = 0; !direct && d < q.d_in; ++d) {
      write_vector(p.dbilinear.dtype, to + d * p.dbilinear.strides[0] * size, p.dbilinear.strides[2],
                   at.out + d * all.lanes, q.context_dim);
    }
  }

  // dy[n, e] c[n, :] as words along n
  template <Dtype D>
  void gated_contexts(int i, int64_t e, int64_t n, int64_t rows, float* to) const {
    const Projection& p = q.projection[i];
    const int64_t steps = words<W>(rows);
    for (int64_t s = 0; s < steps; ++s) {
      float* const out = to + s * all.lanes;
      const int64_t m = s * W::PER;
      const bool one = m < rows, two = W::PER == 2 && m + 1 < rows;
      const V first = splat(one ? element<D>(p.rows, n + m, p.d_out, e) : 0.0f);
      const V second = splat(two ? element<D>(p.rows, n + m + 1, p.d_out, e) : 0.0f);
      for (int64_t k = 0; k < all.lanes; k += VL) {
        const V low = one ? first * all.context(n + m, k) : V{};
        if constexpr (W::PER == 1) {
          store(out + k, low);
        } else {
          store(out + k, pair(low, two ? second * all.context(n + m + 1, k) : V{}));
        }
      }
    }
  }

  const Call& q;
  const Tiles t;
  Together all;
  RowWords<W> x, dy_words[kMaxProjections];
  LeftRows<W> dy[kMaxProjections];
  DContext dcontext;
  bool need_weight = false, need_bilinear = false;
  int64_t widest = 0;
  char* threads;
  int64_t each_thread, bytes;
};

}  // namespace
}  // namespace ctxkern
