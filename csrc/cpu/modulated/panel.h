// Panel: weights of all contexts for a strip, then their products with x, strip after strip.
//
//   forward, a strip of columns of E:  W_u[:, strip] = weight + Σ_k bilinear[:, strip, k] c[u, k];  y_u[:, strip] = x_u W_u
//   backward, a strip of rows of D:    G_u = x_u[:, strip]^T dy_u;  dbilinear, dweight, dcontext from G (gradients.h);
//                                      dx_u[:, strip] = dy_u W_u[strip]^T
//
// A strip is one thread's work. Sums run in an order that shapes and budget alone decide, so that the number of threads
// changes no bit; those for dcontext are kept apart by ranges of strips and added at the end.
#pragma once

#include "gradients.h"

namespace ctxkern {
namespace {

// Bytes of a block of weights, and in the backward of their gradients, that stay in the second level of cache with what
// they are multiplied with, and the shortest sum that a product is cut to for that (bench/LOG.md).
constexpr int64_t kBlockBytes = 1 << 20, kShortest = 64;
// Rows of D of a strip of the backward from so many rows of x a context on: each strip reads dy again, for G and for dx.
constexpr int64_t kRowsOfD = 32, kManyRows = 1024;
// Rows of x that meet all panels of a strip together.
constexpr int64_t kFewRows = 64;
// Shares of the budget for one thread's strip; more threads than that take turns.
constexpr int64_t kShares = 16;

// Bytes between what belongs to two contexts, so that equal places in all of them do not share one set of a cache.
constexpr int64_t kPad = 128;

template <class W>
struct PanelForward {
  static constexpr int64_t NR = 2 * VL;

  // The rows of D that fit, with those of all contexts, and columns enough for every thread.
  static Tiles tiles(const Call& q) {
    const int64_t contexts = q.rows->contexts > 0 ? q.rows->contexts : 1, threads = q.threads,
                  share = q.workspace_bytes / threads;
    int64_t widest = 0;
    for (int i = 0; i < q.projections; ++i) {
      const int64_t panels = round_up(q.projection[i].d_out, NR) / NR;
      widest = panels > widest ? panels : widest;
    }
    const int64_t deep = round_up(q.d_in > 0 ? q.d_in : 1, W::PER * W::STEP * 2);
    Tiles t{NR, deep, contexts, threads, 1, 0, 0};
    const auto bytes = [&] { return t.group * (t.strip / NR * words<W>(t.across) * NR * 4 + kPad); };
    const int64_t limit = kBlockBytes < share ? kBlockBytes : share;
    if (W::PER == 1 && t.across > kDeepest) t.across = kDeepest;
    while (bytes() > limit && t.across > kShortest) t.across = round_up(t.across / 2, W::PER * W::STEP * 2);
    while (bytes() > share && t.group > 1) t.group = (t.group + 1) / 2;
    while (t.across == deep && 2 * bytes() <= kBlockBytes && t.strip / NR * 8 * threads <= widest) t.strip *= 2;
    const int64_t strips = widest > 0 ? round_up(widest, t.strip / NR) / (t.strip / NR) * q.projections : 1;
    if (strips < threads) {
      const int64_t parts = (threads + strips - 1) / strips, group = (contexts + parts - 1) / parts;
      t.group = t.group < group ? t.group : group;
    }
    t.weights_bytes = threads * bytes();
    t.bytes = PanelForward(q, t, nullptr).bytes;
    return t;
  }

  PanelForward(const Call& problem, const Tiles& tiles, char* workspace)
      : q(problem),
        t(tiles),
        x(problem, problem.x.data, problem.d_in, LeftRows<W>::in_place_along(problem.d_in, columns_of(problem))),
        contexts(problem, false) {
    Arena arena(workspace);
    x.place(arena);
    contexts.place(q, arena);
    bias_at = contexts.along_k_words * 4 * VL + 8 * VL;
    weights_at = bias_at + round_up(t.strip, 16);
    y_at = weights_at + round_up(t.group * context_floats(), 16);
    each_thread = y_at + (summed() ? round_up(q.rows->count * t.strip, 16) : 0);
    threads = arena.take(each_thread * t.threads);
    bytes = arena.used();
  }

  // Of the weights of one context in a block.
  int64_t context_floats() const { return t.strip / NR * words<W>(t.across) * NR + kPad / 4; }

  // Whether several products add up to y.
  bool summed() const { return t.across < q.d_in; }

  void run() const {
    const int64_t count = q.rows->contexts;
    if (count == 0) return;
    if (x.packed()) pieces_of_rows<W>(*q.rows, t.threads, [&](auto... piece) { x.pack(piece...); });
    contexts.pack(q);
    int64_t first[kMaxProjections + 1] = {0};
    const int64_t groups = (count + t.group - 1) / t.group;
    for (int i = 0; i < q.projections; ++i)
      first[i + 1] = first[i] + round_up(q.projection[i].d_out, t.strip) / t.strip * groups;
    parallel<W>(t.threads, first[q.projections], [&](int64_t unit, int thread) {
      int i = 0;
      while (unit >= first[i + 1]) ++i;
      const int64_t at = unit - first[i], begin = at % groups * t.group;
      strip(q.projection[i], at / groups * t.strip, begin, begin + t.group < count ? begin + t.group : count,
            threads + thread * each_thread);
    });
  }

  // Columns e to e + strip of y, of contexts begin to end.
  void strip(const Projection& p, int64_t e, int64_t begin, int64_t end, float* scratch) const {
    const int64_t columns = p.d_out - e < t.strip ? p.d_out - e : t.strip;
    for (int64_t d = 0; d == 0 || d < q.d_in; d += t.across) {
      const int64_t rows = q.d_in - d < t.across ? q.d_in - d : t.across;
      make(p, d, rows, e, columns, begin, end, scratch);
      project(p, d, rows, e, columns, begin, end, scratch);
    }
    if (summed()) write(p, e, columns, begin, end, scratch + y_at);
  }

  // Rows d to d + rows of W_u as panels [words of D, NR] of every context of a group.
  void make(const Projection& p, int64_t d, int64_t rows, int64_t e, int64_t columns, int64_t begin, int64_t end,
            float* scratch) const {
    float* const panel = scratch;
    float* const bias = scratch + contexts.along_k_words * 4 * VL;
    float* const weights = scratch + weights_at;
    const int64_t depth = words<W>(t.across), context = context_floats();
    if (q.context_dim == 0 && p.weight.data) {
      for (int64_t u = 0; u < end - begin; ++u) lay_out_weight<W>(p, d, rows, e, columns, weights + u * context, depth);
      return;
    }
    for (int64_t r = 0; r < rows; r += 2) {
      for (int64_t j = 0; j < columns; j += NR) {
        const Place then = Place{d + r, e + j}.after(NR, e, e + columns);
        Ahead next = panel_ahead(q, p, then, then.after(NR, e, e + columns), NR);
        next.share(lines_ahead<W, 4>(end - begin, contexts.along_k_words), blocks_of<W>(q, 1));
        weight_panel<W>(q, p, d + r, e + j, panel, bias, &next);
        float* const to = weights + j * depth + r / W::PER * NR;
        Out out{reinterpret_cast<char*>(to), context * 4, W::PER == 2 ? Store::pairs : Store::f32, 4 * VL, NR * 4};
        out.bias = bias;
        product<W, 4>(end - begin, contexts.along_k_words, contexts.left(begin), {panel, 4 * VL}, out, 0, &next);
      }
    }
    for (int64_t s = round_up(rows, 2) / W::PER; s < words<W>(rows); ++s) {
      for (int64_t u = 0; u < end - begin; ++u) {
        for (int64_t j = 0; j < columns; j += NR) std::memset(weights + u * context + j * depth + s * NR, 0, NR * 4);
      }
    }
  }

  // y_u[:, strip] (+)= x_u[:, rows] W_u[rows, strip]
  void project(const Projection& p, int64_t d, int64_t rows, int64_t e, int64_t columns, int64_t begin, int64_t end,
               float* scratch) const {
    const int64_t size = size_of(q.x.dtype), depth = words<W>(t.across);
    const bool last = d + rows >= q.d_in;
    float* const bias = scratch + bias_at;
    if (p.bias.data) pack_vector(bias, p.bias.dtype, p.bias.data + e * size_of(p.bias.dtype), 1, columns, t.strip);
    for (int64_t u = begin; u < end; ++u) {
      const Right weights{scratch + weights_at + (u - begin) * context_floats(), NR, depth * NR};
      x.pieces(u, [&](const Piece& piece) {
        // a few rows at a time stay in cache while the panels pass
        for (int64_t r = 0; r < piece.count; r += kFewRows) {
          Left left = x.at(piece.left + r);
          left.data += d / W::PER * 4;
          Out out{p.rows + ((piece.map ? 0 : piece.out + r) * p.d_out + e) * size, p.d_out * size, store_of(q.x.dtype),
                  columns};
          out.map = piece.map ? piece.map + r : nullptr;
          if (summed())
            out = Out{reinterpret_cast<char*>(scratch + y_at + (piece.left + r) * t.strip), t.strip * 4, Store::f32,
                      columns};
          if (d > 0) out.store = Store::f32_add;
          out.bias = last && p.bias.data ? bias : nullptr;
          const int64_t count = piece.count - r < kFewRows ? piece.count - r : kFewRows;
          product_wide<W>(count, words<W>(rows), left, weights, out);
        }
      });
    }
  }

  void write(const Projection& p, int64_t e, int64_t columns, int64_t begin, int64_t end, const float* sums) const {
    for (int64_t u = begin; u < end; ++u) {
      x.pieces(u, [&](const Piece& piece) { write_rows(q, piece, sums, t.strip, p.rows, p.d_out, e, columns); });
    }
  }

  const Call& q;
  const Tiles t;
  LeftRows<W> x;
  Contexts<W> contexts;
  float* threads;
  int64_t bias_at, weights_at, y_at, each_thread, bytes;
};

// P: words of products with parameters (weights, dbilinear, dcontext); R: of products with rows of x and dy.
template <class P, class R>
struct PanelBackward {
  static constexpr int64_t NR = 2 * VL;
  static constexpr int64_t kWeight = size_of(R::dtype), kProduct = size_of(P::dtype);  // bytes
  static_assert(kWeight <= kProduct, "W_u is written over G_u, row after row");

  static Tiles tiles(const Call& q) {
    const int64_t contexts = q.rows->contexts > 0 ? q.rows->contexts : 1;
    int64_t widest = 1;
    for (int i = 0; i < q.projections; ++i) widest = q.projection[i].d_out > widest ? q.projection[i].d_out : widest;
    const bool wide = q.d_in > kRowsOfD && kRowsOfD > NR && q.rows->count >= kManyRows * contexts;
    const int64_t strip = wide ? kRowsOfD : q.d_in > NR ? NR : VL, share = q.workspace_bytes / kShares;
    int64_t across = round_up(widest, NR), group = contexts;
    const auto each = [&] { return strip * across * kProduct + kPad; };
    const int64_t limit = kBlockBytes < share ? kBlockBytes : share;
    if (R::PER == 1 && across > kDeepest) across = kDeepest;
    while (each() * contexts > limit && across > kShortest) across = round_up(across / 2, NR);
    while (each() * contexts > share && across > NR) across = round_up(across / 2, NR);
    if (each() * contexts > share) {
      // sums over groups of contexts
      const int64_t sums = strip * across * (round_up(q.context_dim, VL) + 1) * 4;
      group = share > sums ? (share - sums) / each() : 0;
      group = group / (P::PER * P::STEP) * (P::PER * P::STEP);
      if (group < P::PER * P::STEP) group = P::PER * P::STEP;
      if (group > contexts) group = contexts;
    }
    Tiles t{strip, across, group, 1, 1, 0, 0};
    const int64_t strips = (q.d_in + strip - 1) / strip;
    t.ranges = ranges_for(q, strips);
    const int64_t a_thread =
        each() * group + (group < contexts ? strip * across * (round_up(q.context_dim, VL) + 1) * 4 : 0);
    t.threads = threads_for(q, a_thread, t.ranges);
    t.weights_bytes = t.threads * a_thread + t.ranges * range_bytes(q);
    PanelBackward counted(q, t, nullptr);
    t.bytes = counted.bytes;
    return t;
  }

  PanelBackward(const Call& problem, const Tiles& tiles, char* workspace)
      : q(problem),
        t(tiles),
        need_products(needs_products(problem)),
        contexts(problem, true),
        shared(problem, need_products),
        row(problem, contexts, t.across < kChunk<P> ? t.across : kChunk<P>, t.group) {
    Arena arena(workspace);
    contexts.place(q, arena);
    shared.place(arena);
    dcontext.place(q, t.ranges, arena);
    Arena one(nullptr);
    place(one, Thread{});
    each_thread = one.used();
    threads = arena.take<char>(each_thread * t.threads);
    bytes = arena.used();
  }

  // What one thread works in.
  struct Thread {
    char* weights;
    float *panel, *bias, *turned, *dx, *sums;
    RowScratch row;
  };

  // Of one context, and of a row of it.
  int64_t context_bytes() const { return t.strip * row_bytes() + kPad; }
  int64_t row_bytes() const { return t.across * kProduct; }

  Thread place(Arena& arena, Thread at) const {
    at.weights = arena.take<char>(t.group * context_bytes());
    at.panel = arena.take(contexts.along_k_words * 4 * VL);
    at.bias = arena.take(4 * VL);
    at.turned = q.dx ? arena.take(words<R>(t.across) * round_up(t.strip, NR)) : nullptr;
    at.dx = q.dx && summed() ? arena.take(q.rows->count * t.strip) : nullptr;
    at.sums = t.group < q.rows->contexts ? arena.take(t.strip * t.across * (contexts.lanes + 1)) : nullptr;
    row.place(arena, at.row);
    return at;
  }

  // Whether several products add up to dx.
  bool summed() const {
    bool several = q.projections > 1;
    for (int i = 0; i < q.projections; ++i) several = several || q.projection[i].d_out > t.across;
    return several;
  }

  bool need_contexts() const {
    bool needed = q.dx != nullptr;
    for (int i = 0; i < q.projections; ++i) needed = needed || q.projection[i].dbilinear.data;
    return needed;
  }

  // Whether no projection has columns.
  bool empty() const { return columns_of(q) == 0; }

  void run() {
    const int64_t strips = (q.d_in + t.strip - 1) / t.strip;
    if (need_contexts()) contexts.pack(q);
    dcontext.clear();
    if (q.dx && empty()) std::memset(q.dx, 0, static_cast<size_t>(q.batch.tokens * q.d_in * size_of(q.x.dtype)));
    pieces_of_rows<R>(*q.rows, t.threads, [&](auto... piece) { shared.pack(piece...); });
    parallel<R>(t.threads, t.ranges, [&](int64_t range, int thread) {
      Arena arena(threads + thread * each_thread);
      Thread at = place(arena, Thread{});
      for (int64_t s = strips * range / t.ranges; s < strips * (range + 1) / t.ranges; ++s)
        strip(s * t.strip, range, at);
    });
    dcontext.write(q);
  }

  void strip(int64_t d, int64_t range, Thread& at) {
    const int64_t rows = q.d_in - d < t.strip ? q.d_in - d : t.strip, count = q.rows->contexts;
    bool started = false;
    for (int i = 0; i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      for (int64_t e = 0; e < p.d_out; e += t.across) {
        const int64_t columns = p.d_out - e < t.across ? p.d_out - e : t.across;
        for (int64_t begin = 0; begin == 0 || begin < count; begin += t.group) {
          const Block b{d, rows, e, columns, begin, begin + t.group < count ? begin + t.group : count};
          if (need_products) products(i, b, at);
          rows_of(i, b, range, at);
          if (q.dx) project(i, b, started, at);
        }
        started = true;
      }
    }
    if (at.dx) write_dx(d, rows, at);
  }

  // G_u of a block, [contexts, strip, across]
  void products(int i, const Block& b, Thread& at) const {
    constexpr int64_t size = kProduct;
    for (int64_t u = b.begin; u < b.end; ++u) {
      char* const to = at.weights + (u - b.begin) * context_bytes();
      const Out out{to, row_bytes(), store_of(P::dtype), b.columns};
      shared.products(i, u, b, out);
      const int64_t padded = words<P>(b.columns) * P::PER;
      for (int64_t r = 0; padded > b.columns && r < b.rows; ++r) {
        std::memset(to + r * row_bytes() + b.columns * size, 0, (padded - b.columns) * size);
      }
    }
  }

  // Row after row of `bilinear`: what the gradients take from G, then the weights in its place.
  void rows_of(int i, const Block& b, int64_t range, Thread& at) {
    const Projection& p = q.projection[i];
    const int64_t widest = t.across < kChunk<P> ? t.across : kChunk<P>;
    for (int64_t r = 0; r < b.rows; r += 2) {
      const int64_t d = b.d + r;
      for (int64_t c = 0; c < b.columns; c += kChunk<P>) {
        const int64_t chunk = b.columns - c < kChunk<P> ? b.columns - c : kChunk<P>;
        for (int64_t i = 0; need_products && i < 2 && r + i < b.rows; ++i) {
          const char* const g = at.weights + (r + i) * row_bytes() + c * kProduct;
          const Products made{g, context_bytes(), b.begin, b.end - b.begin};
          Sums sums;
          if (at.sums) {
            float* const first = at.sums + ((r + i) * t.across + c) * (contexts.lanes + 1);
            sums = Sums{first, first + chunk, b.begin > 0, b.end == q.rows->contexts};
          }
          row.add(p, d + i, b.e + c, chunk, made, dcontext.at(range), sums, at.row);
        }
        if (!q.dx) continue;
        const Place then = Place{d, b.e + c}.after(kChunk<P>, b.e, b.e + b.columns);
        Ahead next = panel_ahead(q, p, then, then.after(kChunk<P>, b.e, b.e + b.columns), widest);
        const int64_t panels = round_up(chunk, NR) / NR;
        next.share(panels * lines_ahead<P, 4>(b.end - b.begin, contexts.along_k_words), blocks_of<P>(q, panels));
        for (int64_t j = c; j < c + chunk; j += NR) {
          weight_panel<P>(q, p, d, b.e + j, at.panel, at.bias, &next);
          Out out{at.weights + r * row_bytes() + j * kWeight, context_bytes(), store_of(R::dtype), 4 * VL, row_bytes()};
          out.bias = at.bias;
          product<P, 4>(b.end - b.begin, contexts.along_k_words, contexts.left(b.begin), {at.panel, 4 * VL}, out, 0,
                        &next);
        }
      }
    }
  }

  // dx_u[:, strip] (+)= dy_u W_u^T
  void project(int i, const Block& b, bool add, Thread& at) const {
    const int64_t out_size = size_of(q.x.dtype);
    for (int64_t u = b.begin; u < b.end; ++u) {
      const char* const weights = at.weights + (u - b.begin) * context_bytes();
      const int64_t steps = words<R>(b.columns), row = row_bytes();
      for (int64_t r = 0; r < b.rows; r += NR)
        pack_lanes<R, R::dtype>(at.turned + r * steps, NR, weights + r * row, row, kWeight, b.rows - r, b.columns);
      const LeftRows<R>& dy = shared.dy[i];
      dy.pieces(u, [&](const Piece& piece) {
        Left left = dy.at(piece.left);
        left.data += b.e / R::PER * 4;
        Out out{q.dx + (piece.out * q.d_in + b.d) * out_size, q.d_in * out_size, store_of(q.x.dtype), b.rows};
        out.map = piece.map;
        if (at.dx) {
          // in grouped order, or that of the pieces: the same on the way back
          out = Out{reinterpret_cast<char*>(at.dx + piece.left * t.strip), t.strip * 4, Store::f32, b.rows};
        }
        if (add) out.store = Store::f32_add;
        product_wide<R>(piece.count, steps, left, {at.turned, NR, steps * NR}, out);
      });
    }
  }

  void write_dx(int64_t d, int64_t rows, const Thread& at) const {
    for (int64_t u = 0; u < q.rows->contexts; ++u) {
      shared.dy[0].pieces(u, [&](const Piece& piece) { write_rows(q, piece, at.dx, t.strip, q.dx, q.d_in, d, rows); });
    }
  }

  const Call& q;
  const Tiles t;
  bool need_products;
  Contexts<P> contexts;
  SharedRows<R> shared;
  DContext dcontext;
  RowGradients<P> row;
  char* threads;
  int64_t each_thread, bytes;
};

}  // namespace
}  // namespace ctxkern
