// Outer: no weight is stored. Each row of every context's weight is made in registers and used up at once, for few rows a
// context: decoding, a context per token.
//
//   forward, columns e of E:   y[n, e] = Σ_d x[n, d] (weight[d, e] + Σ_k bilinear[d, e, k] c[n, k])
//   backward, rows d of D:     dx[n, d] = Σ_e dy[n, e] (weight[d, e] + Σ_k bilinear[d, e, k] c[n, k])
//                              G_u[d, e] = Σ_{n of u} x[n, d] dy[n, e], and from it what gradients.h takes
#pragma once

#include "gradients.h"

namespace ctxkern {
namespace {

// Contexts at a time: their piece of the weights, and in the backward of G, stay in the first levels of cache.
constexpr int64_t kMade = 28, kContexts = 64;

// x or dy as float32 in grouped order: in place where it is so already.
class Plain {
 public:
  Plain() = default;
  Plain(const Problem& q, const char* data, int64_t columns)
      : rows_(q.rows), source_(data), columns_(columns), dtype_(q.dtype), packed_(q.dtype != Dtype::f32 || q.rows->order) {}

  void place(Arena& arena) { buffer_ = packed_ ? arena.take(rows_->count * columns_ + VL) : nullptr; }

  void pack(int64_t row) const {
    if (!packed_) return;
    const char* const from = source_ + (rows_->order ? rows_->order[row] : row) * columns_ * size_of(dtype_);
    with_dtype(dtype_, [&](auto type) {
      constexpr Dtype D = decltype(type)::value;
      float* const to = buffer_ + row * columns_;
      for (int64_t j = 0; j < columns_; j += VL) {
        const V v = load_f32_first<D>(from + j * size_of(D), columns_ - j);
        store_as_first<Dtype::f32>(reinterpret_cast<char*>(to + j), v, columns_ - j);
      }
    });
  }

  const float* at(int64_t row) const { return (packed_ ? buffer_ : reinterpret_cast<const float*>(source_)) + row * columns_; }

 private:
  const Rows* rows_ = nullptr;
  const char* source_ = nullptr;
  int64_t columns_ = 0;
  Dtype dtype_ = Dtype::f32;
  bool packed_ = false;
  float* buffer_ = nullptr;
};

inline V load_lanes(const float* p, int64_t n) { return load_f32_first<Dtype::f32>(reinterpret_cast<const char*>(p), n); }

template <class W>
struct OuterForward {
  static constexpr int64_t NR = 2 * VL;

  static Tiles tiles(const Problem& q) {
    int64_t panels = 0;
    for (int i = 0; i < q.projections; ++i) panels += round_up(q.projection[i].d_out, NR) / NR;
    const int64_t count = q.rows->contexts, parts = panels > 0 ? (q.threads + panels - 1) / panels : 1;
    int64_t group = (count + parts - 1) / parts;
    if (group < 1) group = 1;
    Tiles t{NR, q.d_in, group, q.threads, 1, 0, 0};
    t.bytes = OuterForward(q, t, nullptr).bytes;
    return t;
  }

  OuterForward(const Problem& problem, const Tiles& tiles, char* workspace)
      : q(problem), t(tiles), x(problem, problem.x, problem.d_in), contexts(problem, false) {
    Arena arena(workspace);
    x.place(arena);
    contexts.place(q, arena);
    made_at = contexts.along_k_words * 4 * VL;
    y_at = made_at + kMade * 4 * VL;
    each_thread = y_at + 4 * VL + q.rows->count * NR;
    threads = arena.take(each_thread * t.threads);
    bytes = arena.used();
  }

  void run() const {
    const int64_t count = q.rows->contexts, groups = (count + t.group - 1) / t.group;
    contexts.pack(q);
    parallel(t.threads, q.rows->count, [&](int64_t row, int) { x.pack(row); });
    int64_t first[kMaxProjections + 1] = {0};
    for (int i = 0; i < q.projections; ++i) first[i + 1] = first[i] + round_up(q.projection[i].d_out, NR) / NR * groups;
    parallel(t.threads, first[q.projections], [&](int64_t unit, int thread) {
      int i = 0;
      while (unit >= first[i + 1]) ++i;
      const int64_t at = unit - first[i], begin = at % groups * t.group;
      columns(q.projection[i], at / groups * NR, begin, begin + t.group < count ? begin + t.group : count,
              threads + thread * each_thread);
    });
  }

  void columns(const Projection& p, int64_t e, int64_t begin, int64_t end, float* scratch) const {
    const Rows& rows = *q.rows;
    float* const panel = scratch;
    float* const made = scratch + made_at;
    float* const bias = scratch + y_at;
    float* const y = bias + 4 * VL - rows.first[begin] * NR;
    const int64_t ahead = 2 * p.bilinear.d * size_of(p.bilinear.dtype);
    std::memset(y + rows.first[begin] * NR, 0, static_cast<size_t>((rows.first[end] - rows.first[begin]) * NR) * 4);
    for (int64_t d = 0; d < q.d_in; d += 2) {
      weight_panel<W>(q, p, d, e, panel, bias, d + 3 < q.d_in ? ahead : 0);
      const bool second = d + 1 < q.d_in;
      for (int64_t u = begin; u < end; u += kMade) {
        const int64_t count = end - u < kMade ? end - u : kMade;
        Out out{reinterpret_cast<char*>(made), 4 * VL * 4, Store::f32, 4 * VL, NR * 4};
        out.bias = bias;
        product<W, 4>(count, contexts.along_k_words, contexts.left(u), {panel, 4 * VL}, out);
        for (int64_t v = 0; v < count; ++v) {
          const float* const w = made + v * 4 * VL;
          for (int64_t n = rows.first[u + v]; n < rows.first[u + v + 1]; ++n) {
            const V x0 = splat(x.at(n)[d]), x1 = splat(second ? x.at(n)[d + 1] : 0.0f);
            float* const to = y + n * NR;
            for (int64_t j = 0; j < NR; j += VL) {
              store(to + j, load<V>(to + j) + x0 * load<V>(w + j) + x1 * load<V>(w + NR + j));
            }
          }
        }
      }
    }
    const int64_t lanes = p.d_out - e < NR ? p.d_out - e : NR, size = size_of(q.dtype);
    float add[NR] = {};
    if (p.bias) pack_vector(add, p.bias_dtype, p.bias + e * size_of(p.bias_dtype), 1, lanes, NR);
    with_dtype(q.dtype, [&](auto type) {
      for (int64_t n = rows.first[begin]; n < rows.first[end]; ++n) {
        char* const to = p.y + ((rows.order ? rows.order[n] : n) * p.d_out + e) * size;
        for (int64_t j = 0; j < lanes; j += VL) {
          store_as_first<decltype(type)::value>(to + j * size, load<V>(y + n * NR + j) + load<V>(add + j), lanes - j);
        }
      }
    });
  }

  const Problem& q;
  const Tiles t;
  Plain x;
  Contexts<W> contexts;
  float* threads;
  int64_t made_at, y_at, each_thread, bytes;
};

template <class W>
struct OuterBackward {
  static constexpr int64_t NR = 2 * VL;
  // Contexts a group, in whole words.
  static constexpr int64_t GROUP = kContexts;

  static Tiles tiles(const Problem& q) {
    Tiles t{2, kChunk, GROUP, 1, 1, 0, 0};
    t.ranges = ranges_for(q, (q.d_in + 1) / 2);
    t.threads = threads_for(q, 0, t.ranges);
    t.weights_bytes = t.ranges * range_bytes(q);
    t.bytes = OuterBackward(q, t, nullptr).bytes;
    return t;
  }

  OuterBackward(const Problem& problem, const Tiles& tiles, char* workspace)
      : q(problem),
        t(tiles),
        need_products(needs_products(problem)),
        contexts(problem, true),
        x(problem, problem.x, problem.d_in),
        row(problem, contexts, kChunk, GROUP) {
    Arena arena(workspace);
    contexts.place(q, arena);
    x.place(arena);
    for (int i = 0; i < q.projections; ++i) {
      dy[i] = Plain(q, q.projection[i].dy, q.projection[i].d_out);
      dy[i].place(arena);
    }
    dcontext.place(q, t.ranges, arena);
    Arena one(nullptr);
    place(one, Thread{});
    each_thread = one.used();
    threads = arena.take<char>(each_thread * t.threads);
    bytes = arena.used();
  }

  struct Thread {
    float *panel, *bias, *made, *products, *sums, *dx;
    RowScratch row;
  };

  Thread place(Arena& arena, Thread at) const {
    at.panel = arena.take(contexts.along_k_words * 4 * VL);
    at.bias = arena.take(4 * VL);
    at.made = arena.take(kMade * 4 * VL);
    at.products = need_products ? arena.take(GROUP * kChunk / W::PER) : nullptr;
    at.sums = need_products && q.rows->contexts > GROUP ? arena.take(kChunk * (contexts.lanes + 1)) : nullptr;
    at.dx = q.dx ? arena.take(q.rows->count * 2 * VL) : nullptr;
    row.place(arena, at.row);
    return at;
  }

  void run() {
    const int64_t pairs = (q.d_in + 1) / 2;
    contexts.pack(q);
    dcontext.clear();
    parallel(t.threads, q.rows->count, [&](int64_t n, int) {
      x.pack(n);
      for (int i = 0; i < q.projections; ++i) dy[i].pack(n);
    });
    parallel(t.threads, t.ranges, [&](int64_t range, int thread) {
      Arena arena(threads + thread * each_thread);
      const Thread at = place(arena, Thread{});
      for (int64_t s = pairs * range / t.ranges; s < pairs * (range + 1) / t.ranges; ++s) two_rows(2 * s, range, at);
    });
    dcontext.write(q);
  }

  // Rows d and d + 1 of every projection's weight.
  void two_rows(int64_t d, int64_t range, const Thread& at) const {
    const int64_t rows = q.d_in - d < 2 ? q.d_in - d : 2;
    if (at.dx) std::memset(at.dx, 0, static_cast<size_t>(q.rows->count * 2 * VL) * 4);
    for (int i = 0; i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      for (int64_t e = 0; e < p.d_out; e += kChunk) {
        const int64_t columns = p.d_out - e < kChunk ? p.d_out - e : kChunk;
        if (at.dx) {
          for (int64_t j = e; j < e + columns; j += NR) add_dx(i, d, j, at);
        }
        for (int64_t r = 0; need_products && r < rows; ++r) gradients(i, d + r, e, columns, range, at);
      }
    }
    if (at.dx) write_dx(d, rows, at);
  }

  // dx[n, d...] += dy[n, e...] W_u[d..., e...]^T, lane by lane
  void add_dx(int i, int64_t d, int64_t e, const Thread& at) const {
    const Projection& p = q.projection[i];
    const Rows& rows = *q.rows;
    const int64_t lanes = p.d_out - e < NR ? p.d_out - e : NR;
    const int64_t ahead = NR * p.bilinear.e * size_of(p.bilinear.dtype);
    weight_panel<W>(q, p, d, e, at.panel, at.bias, e + NR < p.d_out ? ahead : 0);
    for (int64_t u = 0; u < rows.contexts; u += kMade) {
      const int64_t count = rows.contexts - u < kMade ? rows.contexts - u : kMade;
      Out out{reinterpret_cast<char*>(at.made), 4 * VL * 4, Store::f32, 4 * VL, NR * 4};
      out.bias = at.bias;
      product<W, 4>(count, contexts.along_k_words, contexts.left(u), {at.panel, 4 * VL}, out);
      for (int64_t v = 0; v < count; ++v) {
        const float* const w = at.made + v * 4 * VL;
        for (int64_t n = rows.first[u + v]; n < rows.first[u + v + 1]; ++n) {
          const V low = load_lanes(dy[i].at(n) + e, lanes), high = load_lanes(dy[i].at(n) + e + VL, lanes - VL);
          float* const to = at.dx + n * 2 * VL;
          store(to, load<V>(to) + low * load<V>(w) + high * load<V>(w + VL));
          store(to + VL, load<V>(to + VL) + low * load<V>(w + NR) + high * load<V>(w + NR + VL));
        }
      }
    }
  }

  void gradients(int i, int64_t d, int64_t e, int64_t columns, int64_t range, const Thread& at) const {
    const Rows& rows = *q.rows;
    const int64_t size = W::PER == 2 ? 2 : 4, context = kChunk * size;
    for (int64_t begin = 0; begin == 0 || begin < rows.contexts; begin += GROUP) {
      const int64_t end = begin + GROUP < rows.contexts ? begin + GROUP : rows.contexts;
      char* const g = reinterpret_cast<char*>(at.products);
      for (int64_t u = begin; u < end; ++u) {
        for (int64_t j = 0; j < kChunk; j += VL) {
          V total{};
          for (int64_t n = rows.first[u]; n < rows.first[u + 1]; ++n) {
            total += splat(x.at(n)[d]) * load_lanes(dy[i].at(n) + e + j, columns - j);
          }
          store_as<W::dtype>(g + (u - begin) * context + j * size, total);
        }
      }
      Sums sums;
      if (at.sums) sums = Sums{at.sums, at.sums + kChunk, begin > 0, end == rows.contexts};
      row.add(q.projection[i], d, e, columns, {g, context, begin, end - begin}, dcontext.at(range), sums, at.row);
    }
  }

  void write_dx(int64_t d, int64_t rows, const Thread& at) const {
    const int64_t size = size_of(q.dtype);
    for (int64_t n = 0; n < q.rows->count; ++n) {
      char* const to = q.dx + ((q.rows->order ? q.rows->order[n] : n) * q.d_in + d) * size;
      for (int64_t r = 0; r < rows; ++r) store_scalar(q.dtype, to + r * size, sum(load<V>(at.dx + (n * 2 + r) * VL)));
    }
  }

  const Problem& q;
  const Tiles t;
  bool need_products;
  Contexts<W> contexts;
  Plain x, dy[kMaxProjections];
  DContext dcontext;
  RowGradients<W> row;
  char* threads;
  int64_t each_thread, bytes;
};

}  // namespace
}  // namespace ctxkern
