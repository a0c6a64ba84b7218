// The backward of a panel (panel.h).
#pragma once

#include "gradients.h"
#include "panel.h"

namespace ctxkern {
namespace {

// Rows of D of a strip of the backward from so many rows of x a context on: each strip reads dy again, for G and for dx.
constexpr int64_t kRowsOfD = 32, kManyRows = 1024;
// Shares of the budget for one thread's strip; more threads than that take turns.
constexpr int64_t kShares = 16;

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
    const int64_t block = kBlockBytes + contexts * kPad, limit = block < share ? block : share;
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
        lanes(problem),
        shared(problem, need_products),
        row(problem, contexts, t.across < kChunk<P> ? t.across : kChunk<P>, t.group) {
    Arena arena(workspace);
    contexts.place(q, arena);
    lanes.place(arena);
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
    if (need_contexts()) {
      contexts.pack(q);
      if (std::is_same_v<P, R>) lanes.pack(contexts);
    }
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
        const int64_t fetches = fetches_of<P>(next, panels, b.end - b.begin);
        next.share(panels * lines_ahead<P, 4>(b.end - b.begin, contexts.along_k_words), blocks_of<P>(q, panels));
        for (int64_t j = c; j < c + chunk; j += NR) {
          if constexpr (ContextLanes<P>::kThere && std::is_same_v<P, R>) {
            if (b.rows - r > 1 && c + chunk - j >= NR && lanes.take(p, b.end - b.begin)) {
              panel_bias(q, p, d, b.e + j, at.bias);
              lane_weights<P, false>(lanes, p, d, b.e + j, b.begin, b.end, at.bias,
                                     at.weights + r * row_bytes() + j * kWeight, context_bytes(), row_bytes(), next,
                                     fetches);
              continue;
            }
          }
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
  ContextLanes<P> lanes;
  SharedRows<R> shared;
  DContext dcontext;
  RowGradients<P> row;
  char* threads;
  int64_t each_thread, bytes;
};

}  // namespace
}  // namespace ctxkern
