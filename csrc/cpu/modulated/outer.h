// Outer: no weight is made. A product over rows of x (or dy) and `bilinear` as it lies, and then one with the context:
// for few rows per context, where a weight would cost more than it is used.
//
//   forward, columns of E:  Z[n, k] = Σ_d x[n, d] bilinear[d, e, k];   y[n, e] = Σ_k c[n, k] Z[n, k] + Σ_d x[n, d] weight[d, e]
//   backward, rows of D:    Z[n, k] = Σ_e dy[n, e] bilinear[d, e, k];  dx[n, d] = Σ_k c[n, k] Z[n, k] + Σ_e dy[n, e] weight[d, e]
//                           dcontext[n] += x[n, d] Z[n];               dbilinear[d, e, k] = Σ_n x[n, d] (dy[n, e] c[n, k])
//                           dweight[d, e] = Σ_n x[n, d] dy[n, e]
#pragma once

#include "operands.h"

namespace ctxkern {
namespace {

// Rows whose Z is held at a time; bytes of `bilinear` laid out at a time.
constexpr int64_t kRows = 56, kLaidOut = 512 << 10;

// The rows of all contexts as if they were one's, in grouped order, and the contexts as float32.
struct Together {
  explicit Together(const Call& problem) : q(problem), lanes(round_up(problem.context_dim, VL)) {
    first[1] = problem.rows->count;
    run_first[1] = problem.rows->count;
    rows = Rows{1, problem.rows->count, nullptr, first, nullptr, run_first, problem.rows->order};
    whole = problem;
    whole.rows = &rows;
  }
  Together(const Together&) = delete;

  void place(Arena& arena) { contexts = arena.take(q.rows->count * lanes); }

  // Of each row, [N, K padded].
  void pack() const {
    const int64_t row = q.context_dim * size_of(q.context.dtype);
    for (int64_t u = 0; u < q.rows->contexts; ++u) {
      for (int64_t n = q.rows->first[u]; n < q.rows->first[u + 1]; ++n) {
        pack_vector(contexts + n * lanes, q.context.dtype, q.context.data + q.rows->slot[u] * row, 1, q.context_dim,
                    lanes);
      }
    }
  }

  V context(int64_t n, int64_t k) const { return load<V>(contexts + n * lanes + k); }

  const Call& q;
  int64_t lanes, first[2] = {0, 0}, run_first[2] = {0, 0};
  Rows rows;
  Call whole;
  float* contexts = nullptr;
};

template <class W>
struct OuterForward {
  static constexpr int64_t NR = 2 * VL;

  static Tiles tiles(const Call& q) {
    Tiles t{NR, q.d_in, q.rows->count, q.threads, 1, 0, 0};
    t.bytes = OuterForward(q, t, nullptr).bytes;
    return t;
  }

  OuterForward(const Call& problem, const Tiles& tiles, char* workspace)
      : q(problem),
        t(tiles),
        all(problem),
        x(all.whole, problem.x.data, problem.d_in, LeftRows<W>::in_place_along(problem.d_in, columns_of(problem))),
        depth(words<W>(problem.d_in)) {
    const int64_t each = depth * all.lanes > 0 ? depth * all.lanes : 1;
    columns_at_once = kLaidOut / 4 / each;
    columns_at_once = columns_at_once < 1 ? 1 : columns_at_once > NR ? NR : columns_at_once;
    Arena arena(workspace);
    x.place(arena);
    all.place(arena);
    z_at = round_up(columns_at_once * each > depth * NR ? columns_at_once * each : depth * NR, 16);
    y_at = z_at + kRows * all.lanes;
    each_thread = y_at + round_up(q.rows->count * NR, 16);
    threads = arena.take(each_thread * t.threads);
    bytes = arena.used();
  }

  void run() const {
    if (q.rows->count == 0) return;
    if (x.packed()) pieces_of_rows<W>(*all.whole.rows, t.threads, [&](auto... piece) { x.pack(piece...); });
    all.pack();
    int64_t first[kMaxProjections + 1] = {0};
    for (int i = 0; i < q.projections; ++i) first[i + 1] = first[i] + round_up(q.projection[i].d_out, NR) / NR;
    parallel<W>(t.threads, first[q.projections], [&](int64_t unit, int thread) {
      int i = 0;
      while (unit >= first[i + 1]) ++i;
      strip(q.projection[i], (unit - first[i]) * NR, threads + thread * each_thread);
    });
  }

  void strip(const Projection& p, int64_t e, float* scratch) const {
    const int64_t lanes = p.d_out - e < NR ? p.d_out - e : NR, count = q.rows->count;
    float* const y = scratch + y_at;
    shared_weight(p, e, lanes, scratch, y);
    for (int64_t j = 0; j < lanes; j += columns_at_once) {
      const int64_t columns = lanes - j < columns_at_once ? lanes - j : columns_at_once;
      lay_out(p, e + j, columns, scratch);
      for (int64_t n = 0; n < count; n += kRows) {
        const int64_t rows = count - n < kRows ? count - n : kRows;
        for (int64_t c = 0; c < columns; ++c) {
          float* const z = scratch + z_at;
          const Right columns_of_bilinear{scratch + c * depth * all.lanes, all.lanes};
          product_in_pieces<W>(rows, all.lanes, depth, kDeepest, x.at(n), columns_of_bilinear, z, all.lanes);
          for (int64_t r = 0; r < rows; ++r) {
            V total{};
            for (int64_t k = 0; k < all.lanes; k += VL) total += all.context(n + r, k) * load<V>(z + r * all.lanes + k);
            y[(n + r) * NR + j + c] += sum(total);
          }
        }
      }
    }
    write_rows(q, {0, count, 0, q.rows->order}, y, NR, p.rows, p.d_out, e, lanes);
  }

  // y = x weight + bias
  void shared_weight(const Projection& p, int64_t e, int64_t lanes, float* scratch, float* y) const {
    float bias[NR] = {};
    if (p.bias.data) pack_vector(bias, p.bias.dtype, p.bias.data + e * size_of(p.bias.dtype), 1, lanes, NR);
    if (p.weight.data) {
      const int64_t size = size_of(p.weight.dtype);
      with_source<W>(p.weight.dtype, [&](auto type) {
        pack_rows<W, decltype(type)::value>(scratch, NR, p.weight.data + e * p.weight.strides[1] * size,
                                            p.weight.strides[0] * size, p.weight.strides[1] * size, q.d_in, lanes);
      });
    }
    Out out{reinterpret_cast<char*>(y), NR * 4, Store::f32, lanes};
    out.bias = bias;
    product_wide<W>(q.rows->count, 0, x.at(0), {scratch, NR}, out);
    if (p.weight.data) product_in_pieces<W>(q.rows->count, lanes, depth, kDeepest, x.at(0), {scratch, NR}, y, NR, true);
  }

  // Columns of `bilinear`, each as [words of D, K padded].
  void lay_out(const Projection& p, int64_t e, int64_t columns, float* to) const {
    const int64_t size = size_of(p.bilinear.dtype), each = depth * all.lanes;
    with_source<W>(p.bilinear.dtype, [&](auto type) {
      for (int64_t d = 0; d < q.d_in; d += kStep * W::PER) {
        const int64_t rows = q.d_in - d < kStep * W::PER ? q.d_in - d : kStep * W::PER;
        for (int64_t c = 0; c < columns; ++c) {
          fetch(p, d + kStep * W::PER, e, columns, c);
          pack_rows<W, decltype(type)::value>(
              to + c * each + d / W::PER * all.lanes, all.lanes,
              p.bilinear.data + (d * p.bilinear.strides[0] + (e + c) * p.bilinear.strides[1]) * size,
              p.bilinear.strides[0] * size, p.bilinear.strides[2] * size, rows, q.context_dim);
        }
      }
    });
  }

  // Brings the piece of the rows from d on near that is due with column c, where a run of columns lies together.
  void fetch(const Projection& p, int64_t d, int64_t e, int64_t columns, int64_t c) const {
    if (p.bilinear.strides[2] != 1 || p.bilinear.strides[1] != q.context_dim) return;
    const int64_t size = size_of(p.bilinear.dtype), bytes = columns * q.context_dim * size;
    for (int64_t row = d + c; row < d + kStep * W::PER && row < q.d_in; row += columns) {
      const char* const from = p.bilinear.data + (row * p.bilinear.strides[0] + e * p.bilinear.strides[1]) * size;
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
  }

  // Rows of D laid out at a time: of each a run of columns lies together.
  static constexpr int64_t kStep = 16;

  const Call& q;
  const Tiles t;
  Together all;
  LeftRows<W> x;
  int64_t depth, columns_at_once;
  float* threads;
  int64_t z_at, y_at, each_thread, bytes;
};

}  // namespace
}  // namespace ctxkern
