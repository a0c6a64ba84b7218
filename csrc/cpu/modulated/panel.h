// Panel: weights of all contexts for a strip, then their products with x, strip after strip.
//
//   forward, a strip of columns of E:  W_u[:, strip] = weight + Σ_k bilinear[:, strip, k] c[u, k];  y_u[:, strip] = x_u W_u
//   backward, a strip of rows of D:    G_u = x_u[:, strip]^T dy_u;  dbilinear, dweight, dcontext from G (gradients.h);
//                                      dx_u[:, strip] = dy_u W_u[strip]^T
//
// A strip is one thread's work. Sums run in an order that shapes and budget alone decide, so that the number of threads
// changes no bit; those for dcontext are kept apart by ranges of strips and added at the end.
#pragma once

#include "lanes.h"

namespace ctxkern {
namespace {

// Bytes of a block of weights, and in the backward of their gradients, that stay in the second level of cache with what
// they are multiplied with. Sums over D are cut for that, to pieces of kShortest at the least, and of less than kLong only
// where a block would take twice as much (bench/LOG.md).
constexpr int64_t kBlockBytes = 1 << 20, kShortest = 64, kLong = 256;
// Rows of x that meet all panels of a strip together, and how many a context are few.
constexpr int64_t kFewRows = 64, kFewRowsEach = 32;

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
    // few rows meet a weight once, and it shall be near then; many read and write their sums again for each piece of D
    const bool few = q.rows->count < kFewRowsEach * contexts;
    const int64_t block = (few ? kBlockBytes / 4 : kBlockBytes) + contexts * kPad;
    const auto fits = [&](int64_t limit) { return bytes() <= (limit < share ? limit : share); };
    const auto halve = [&] { t.across = round_up(t.across / 2, W::PER * W::STEP * 2); };
    if (W::PER == 1 && t.across > kDeepest) t.across = kDeepest;
    while (!fits(block) && t.across > (few ? kShortest : kLong)) halve();
    while (!fits(2 * block) && t.across > kShortest) halve();
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
        contexts(problem, false),
        lanes(problem) {
    Arena arena(workspace);
    x.place(arena);
    contexts.place(q, arena);
    lanes.place(arena);
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
    lanes.pack(contexts);
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
        float* const to = weights + j * depth + r / W::PER * NR;
        if constexpr (ContextLanes<W>::kThere) {
          if (rows - r > 1 && columns - j >= NR && lanes.take(p, end - begin)) {
            panel_bias(q, p, d + r, e + j, bias);
            lane_weights<W, true>(lanes, p, d + r, e + j, begin, end, bias, reinterpret_cast<char*>(to), context * 4,
                                  NR * 4, next, fetches_of<W>(next, 1, end - begin));
            continue;
          }
        }
        next.share(lines_ahead<W, 4>(end - begin, contexts.along_k_words), blocks_of<W>(q, 1));
        weight_panel<W>(q, p, d + r, e + j, panel, bias, &next);
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
  ContextLanes<W> lanes;
  float* threads;
  int64_t bias_at, weights_at, y_at, each_thread, bytes;
};

}  // namespace
}  // namespace ctxkern
