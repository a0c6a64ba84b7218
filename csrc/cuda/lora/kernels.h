// Low-rank updates of rows that are grouped by adapter, with h = x Aᵀ and g = dy B for each tile of rows of one adapter:
//
//   lora_y    y[n, e] += s Σ_r h[n, r] B_u[e, r]
//   lora_dx   dx[n, d] += s Σ_r g[n, r] A_u[r, d], where dropout kept x; writes h and g for dA and dB (gradients.h)
//
// x is what dropout leaves of it, except for the base product, which is none of these kernels'. Where there are few tiles,
// columns of y and dx are shared by several blocks, each of which makes h or g again. Where rows have gates, h and g are
// multiplied by them, and lora_dx writes s h g without them, the gradient of the gates.
//
// C: the dtype of x. P: that of the products h and g: C, or float where x is float16 and A or B float32, whose range float16
// does not have. S: in which h and g are kept and multiplied again: C, or float next to float16, which could not hold all
// of them; TF32, in which float runs next to float16, has its 10 bits, so that A and B are split into two values, and h and g
// where gradients are made of them.
#pragma once

#include "operands.h"

namespace ctxkern {

// Rows × ranks, of many ranks and of few; rows × columns of y and dx.
using RankTile = Tile<64, 64, 2, 2>;
using FewRanksTile = Tile<64, 32, 4, 1>;
using ColumnsTile = Tile<64, 128, 1, 4>;

// Ranks of h or g that shared memory holds at once.
constexpr int kMostHeld = 256;

template <class S>
__host__ __device__ constexpr int held_line(int64_t rank) {
  const int ranks = static_cast<int>(rank < kMostHeld ? rank : kMostHeld);
  return (ranks + kChunk<S> - 1) / kChunk<S> * kChunk<S> + kChunk<S>;
}

// Into how many values what stands next to x is split in a product of P.
template <class P, class C>
constexpr int kPlanes = sizeof(P) > sizeof(C) ? 2 : 1;

template <class P, class C, class T>
using HProduct = Product<P, T, kPlanes<P, C>, SeenRows<P, C, true>, Strided<P, C, true>>;
template <class P, class C, class T>
using GProduct = Product<P, T, kPlanes<P, C>, Rows<P, C, true>, Strided<P, C, false>>;
template <class S, class C, bool along_sum>
using ColumnsProduct = Product<S, ColumnsTile, 1, Held<S>, Strided<S, C, along_sum>>;

template <class... Products>
constexpr size_t staged() {
  size_t most = 0;
  ((most = Products::kShared > most ? Products::kShared : most), ...);
  return most;
}

template <class C, class P, class S, class T>
constexpr size_t kUpdateStaged = staged<HProduct<P, C, T>, ColumnsProduct<S, C, true>>();
template <class C, class P, class S, class T>
constexpr size_t kDxStaged = staged<HProduct<P, C, T>, GProduct<P, C, T>, ColumnsProduct<S, C, false>>();

template <class S>
constexpr size_t held_bytes(int64_t rank) {
  return RankTile::kM * held_line<S>(rank) * sizeof(S);
}

// Whether products of P are rounded to TF32.
template <class P, class C>
__device__ __forceinline__ bool rounds(const LoraCall& q) {
  return (sizeof(P) == 4 && sizeof(C) == 2) || q.tf32;
}

// h of a tile's rows, of `ranks` of an adapter from r on.
template <class P, class C, class T>
__device__ __forceinline__ void add_h(Sums<T>& h, const LoraCall& q, const Lines& lines, int64_t slot, int r,
                                      int ranks) {
  const int d_in = static_cast<int>(q.d_in);
  const int64_t* st = q.A.strides;
  const Rows<P, C, true> rows{elements<C>(q.x), q.d_in, lines.order, lines.first, lines.count, d_in};
  const Strided<P, C, true> a{q.A, slot * st[0] + r * st[1], st[1], st[2], ranks, d_in};
  HProduct<P, C, T>::add(h, SeenRows<P, C, true>(rows, dropout_of(q), 0), a, d_in, rounds<P, C>(q));
}

// g, likewise.
template <class P, class C, class T>
__device__ __forceinline__ void add_g(Sums<T>& g, const LoraCall& q, const Lines& lines, int64_t slot, int r,
                                      int ranks) {
  const int d_out = static_cast<int>(q.d_out);
  const int64_t* st = q.B.strides;
  const C* dy = reinterpret_cast<const C*>(q.rows);
  const Rows<P, C, true> rows{dy, q.d_out, lines.order, lines.first, lines.count, d_out};
  const Strided<P, C, false> b{q.B, slot * st[0] + r * st[2], st[2], st[1], ranks, d_out};
  GProduct<P, C, T>::add(g, rows, b, d_out, rounds<P, C>(q));
}

// Each entry times the gate of its row, where there are gates.
template <class T>
__device__ __forceinline__ void gate(Sums<T>& sums, const LoraCall& q, const Lines& lines, int r, int ranks) {
  if (!q.gates) return;
  sums.rows(
      [&](int i) -> const float* {
        if (i >= lines.count) return nullptr;
        const int64_t row = q.gate_of ? q.gate_of[lines.row(i)] : lines.row(i);
        require(row >= 0 && row < q.gate_rows);
        return q.gates + row * q.rank + r;
      },
      [&](const float* gates, int, int column, float& a, float& b) {
        if (!gates) return;
        if (column < ranks) a *= gates[column];
        if (column + 1 < ranks) b *= gates[column + 1];
      });
}

// s h g of a tile's rows: s h, and when g is known times that. A thread has the same entries of both.
template <class T, class F>
__device__ __forceinline__ void each_product(Sums<T>& sums, const LoraCall& q, const Lines& lines, int r, int ranks,
                                             F f) {
  sums.rows([&](int i) { return i < lines.count ? q.products + lines.row(i) * q.rank + r : nullptr; },
            [&](float* to, int, int column, float a, float b) {
              if (!to) return;
              if (column < ranks) f(to[column], a);
              if (column + 1 < ranks) f(to[column + 1], b);
            });
}

// Into shared memory, with zeros behind the last of `ranks`.
template <class S, class T>
__device__ __forceinline__ void hold(S* held, int line, Sums<T>& sums, int ranks) {
  sums.rows([&](int i) { return held + i * line; },
            [&](S* to, int, int column, float a, float b) {
              if (column < (ranks + kChunk<S> - 1) / kChunk<S> * kChunk<S>)
                write_two(to + column, column < ranks ? a : 0.0f, column + 1 < ranks ? b : 0.0f, 2);
            });
}

// Into the rows of a tile of [N, R].
template <class S, class T>
__device__ __forceinline__ void keep(char* rows, Sums<T>& sums, const LoraCall& q, const Lines& lines, int r,
                                     int ranks) {
  S* first = reinterpret_cast<S*>(rows) + static_cast<int64_t>(lines.first) * q.rank + r;
  sums.rows([&](int i) { return i < lines.count ? first + i * q.rank : nullptr; },
            [&](S* to, int, int column, float a, float b) {
              if (to) write_two(to + column, a, b, ranks - column);
            });
}

// Columns `begin` to `end` of y or dx, in rows of `width`, and what dropout keeps of them.
template <class C>
struct Columns {
  C* data;
  int64_t width;
  int begin, end;
  Dropout dropout;
};

// They become, or increase by, held rows times a parameter [n, k], which begins at `from`.
template <class S, class C, bool along_sum>
__device__ __forceinline__ void add_columns(const Columns<C>& out, const Lines& lines, const Held<S>& held,
                                            const Strided<S, C, along_sum>& parameter, float scale, bool adds,
                                            bool tf32) {
  for (int c = out.begin; c < out.end; c += ColumnsTile::kN) {
    const int left = out.end - c;
    Strided<S, C, along_sum> here = parameter;
    here.begin += c * parameter.stride_n;
    here.n = left;
    Sums<ColumnsTile> sums;
    sums.clear();
    ColumnsProduct<S, C, along_sum>::add(sums, held, here, held.depth, tf32);
    struct Line {
      C* to;
      RowDraws draws;
    };
    sums.rows(
        [&](int i) -> Line {
          if (i >= lines.count) return {nullptr, {}};
          const int64_t row = lines.row(i);
          return {out.data + row * out.width + c, out.dropout.of(row)};
        },
        [&](const Line& line, int, int column, float a, float b) {
          if (!line.to) return;
          a *= scale;
          b *= scale;
          if (out.dropout.kept_from) {
            if (!line.draws.kept(c + column)) a = 0;
            if (!line.draws.kept(c + column + 1)) b = 0;
          }
          if (adds) {
            add_two(line.to + column, a, b, left - column);
          } else {
            write_two(line.to + column, a, b, left - column);
          }
        });
  }
}

// What a block has of y or dx: rows of a tile, one of `splits` ranges of columns.
struct Part {
  int tile, begin, end;
};

__device__ __forceinline__ Part part_of(int splits, int columns, int64_t width) {
  const int begin = blockIdx.x % splits * columns;
  return {static_cast<int>(blockIdx.x / splits), begin, least(begin + columns, width)};
}

template <class C, class P, class S, class T>
__global__ void __launch_bounds__(T::kThreads, sizeof(S) == 2 ? 3 : 2)
    lora_y_kernel(LoraCall q, int splits, int columns) {
  const Part part = part_of(splits, columns, q.d_out);
  if (part.tile >= tile_count(q.groups)) return;
  const TileOfRows tile = tile_of(q.batch, q.groups, part.tile);
  const Lines lines{order_of(q.groups), tile.begin, least(tile.end - tile.begin, T::kM)};
  const Adapter adapter = adapter_of(q, tile.context);
  if (q.adds && !adapter.rank) return;
  S* held = reinterpret_cast<S*>(shared_memory() + kUpdateStaged<C, P, S, T>);
  const int line = held_line<S>(q.rank);
  const int64_t* st = q.B.strides;
  const Columns<C> y{reinterpret_cast<C*>(q.rows), q.d_out, part.begin, part.end, {0, 0}};
  int first = 0;
  do {
    const int ranks = least(kMostHeld, adapter.rank - first);
    for (int r = 0; r < ranks; r += T::kN) {
      Sums<T> h;
      h.clear();
      add_h<P, C>(h, q, lines, adapter.slot, first + r, ranks - r);
      gate(h, q, lines, first + r, ranks - r);
      hold(held + r, line, h, ranks - r);
    }
    __syncthreads();
    const Strided<S, C, true> b{q.B, adapter.slot * st[0] + first * st[2], st[1], st[2], 0, ranks};
    add_columns(y, lines, Held<S>{held, line, ranks}, b, adapter.scale, q.adds || first, rounds<S, C>(q));
    first += kMostHeld;
  } while (first < adapter.rank);
}

template <class C, class P, class S, class T>
__global__ void __launch_bounds__(T::kThreads, sizeof(S) == 2 ? 3 : 2)
    lora_dx_kernel(LoraCall q, int splits, int columns) {
  const Part part = part_of(splits, columns, q.dx ? q.d_in : 1);
  if (part.tile >= tile_count(q.groups)) return;
  const TileOfRows tile = tile_of(q.batch, q.groups, part.tile);
  const Lines lines{order_of(q.groups), tile.begin, least(tile.end - tile.begin, T::kM)};
  const Adapter adapter = adapter_of(q, tile.context);
  if (!adapter.rank && (q.adds || !q.dx)) return;
  // what several blocks would write alike
  const bool leads = part.begin == 0;
  S* held = reinterpret_cast<S*>(shared_memory() + kDxStaged<C, P, S, T>);
  const int line = held_line<S>(q.rank);
  const int64_t* st = q.A.strides;
  const Columns<C> dx{reinterpret_cast<C*>(q.dx), q.d_in, part.begin, part.end, dropout_of(q)};
  int first = 0;
  do {
    const int ranks = least(kMostHeld, adapter.rank - first);
    for (int r = 0; r < ranks; r += T::kN) {
      Sums<T> sums;
      if (leads && (q.h || q.products)) {
        sums.clear();
        add_h<P, C>(sums, q, lines, adapter.slot, first + r, ranks - r);
        if (q.products)
          each_product(sums, q, lines, first + r, ranks - r, [&](float& to, float h) { to = adapter.scale * h; });
        gate(sums, q, lines, first + r, ranks - r);
        if (q.h) keep<S>(q.h, sums, q, lines, first + r, ranks - r);
      }
      if (!q.dx && !(leads && (q.g || q.products))) continue;
      sums.clear();
      add_g<P, C>(sums, q, lines, adapter.slot, first + r, ranks - r);
      if (leads && q.products) each_product(sums, q, lines, first + r, ranks - r, [](float& to, float g) { to *= g; });
      gate(sums, q, lines, first + r, ranks - r);
      if (leads && q.g) keep<S>(q.g, sums, q, lines, first + r, ranks - r);
      if (q.dx) hold(held + r, line, sums, ranks - r);
    }
    __syncthreads();
    const Strided<S, C, false> a{q.A, adapter.slot * st[0] + first * st[1], st[2], st[1], 0, ranks};
    if (q.dx) add_columns(dx, lines, Held<S>{held, line, ranks}, a, adapter.scale, q.adds || first, rounds<S, C>(q));
    first += kMostHeld;
  } while (first < adapter.rank);
}

}  // namespace ctxkern
