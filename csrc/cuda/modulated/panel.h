// Panel: weights of all contexts for a block of D × E, then their products with rows of x or dy; block after block.
//
//   panel_weights    W_u[d, e] = weight[d, e] + Σ_k bilinear[d, e, k] c[u, k]    all contexts at once
//   panel_y          y[n, e] = Σ_d x[n, d] W_u[d, e] + bias[e]                   a tile: rows of one context
//   panel_g          G_u[d, e] = Σ_{n of u} x[n, d] dy[n, e]
//   panel_dx         dx[n, d] = Σ_e dy[n, e] W_u[d, e]
//   panel_dbilinear  dbilinear[d, e, k] = Σ_u G_u[d, e] c[u, k]    dweight[d, e] = Σ_u G_u[d, e]
//   panel_dcontext   dcontext[u, k] = Σ_{d, e} bilinear[d, e, k] G_u[d, e]       a part for each range of rows of D
//
// panel_dcontext_sum adds these parts up. The Triton kernels have the same names (ctxkern/modulated/triton/panel.py).
//
// G, and W after it, lie in a workspace, [contexts of a group, rows of a block, columns of a block], in the dtype of x.
// C: the dtype of x. P: that of products with parameters: C, or float where x is float16 and parameters are float32, whose
// range float16 does not have. Reductions have a fixed order; there are no atomics.
#pragma once

#include "operands.h"

namespace ctxkern {

// Contexts × columns; rows of a context × columns: smaller ones, large ones, and those that waste less of what does not
// fill large ones; columns × K and contexts × K, where K is small.
using WeightsTile = Tile<32, 128, 1, 4>;
using SmallTile = Tile<64, 64, 2, 2>;
using LargeTile = Tile<128, 128, 2, 4>;
using HighTile = Tile<128, 64, 2, 2>;
using WideTile = Tile<64, 128, 1, 4>;
using NarrowTile = Tile<128, 32, 4, 1>;
using LeastTile = Tile<32, 32, 2, 2>;

// Whether products of P are rounded to TF32: those with parameters next to float16, and where the caller allows it.
template <class P, class C>
__device__ __forceinline__ bool rounds(const Call& q) {
  return (sizeof(P) == 4 && sizeof(C) == 2) || q.tf32;
}

__device__ __forceinline__ Operand dcontext_of(const Call& q) { return {q.dcontext, q.context.dtype, {}}; }

template <class P, class C>
using PanelWeightsProduct = Product<P, WeightsTile, 1, Contexts<P, C, true>, Strided<P, C, true>>;

template <class P, class C>
__global__ void __launch_bounds__(WeightsTile::kThreads, resident<P, WeightsTile>())
    panel_weights_kernel(Call q, Projection p, Block block, C* __restrict__ panel) {
  // contexts side by side: what they read of bilinear is the same
  const int u_blocks = (block.u_size + WeightsTile::kM - 1) / WeightsTile::kM, piece = blockIdx.x / u_blocks;
  const int e_blocks = (block.e_size + WeightsTile::kN - 1) / WeightsTile::kN;
  const int row = piece / e_blocks, e0 = piece % e_blocks * WeightsTile::kN,
            u0 = blockIdx.x % u_blocks * WeightsTile::kM;
  const int count = least(context_count(q.groups) - block.u_begin, block.u_size);
  if (u0 >= count) return;
  const int64_t d = block.d_begin + row, e = block.e_begin + e0;
  const int* slots = q.groups.uniform ? nullptr : q.groups.buffer + 2;
  const Contexts<P, C, true> a{q.context, q.context_dim, slots, block.u_begin + u0, count - u0, 0};
  const int64_t *st = p.bilinear.strides, *sw = p.weight.strides;
  const Strided<P, C, true> b{p.bilinear, d * st[0] + e * st[1], st[1],
                              st[2],      block.e_size - e0,     static_cast<int>(q.context_dim)};
  const int left = block.e_size - e0;
  Sums<WeightsTile> sums;
  sums.clear();
  PanelWeightsProduct<P, C>::add(sums, a, b, static_cast<int>(q.context_dim), rounds<P, C>(q));
  float weight[WeightsTile::kColumns][2];
  Sums<WeightsTile>::columns([&](int j, int column) {
    read_two<C>(weight[j], p.weight, d * sw[0] + (e + column) * sw[1], sw[1], left - column);
  });
  C* to = panel + (static_cast<int64_t>(u0) * block.d_size + row) * block.e_size + e0;
  sums.rows(
      [&](int u) { return u0 + u < count ? to + static_cast<int64_t>(u) * block.d_size * block.e_size : nullptr; },
      [&](C* line, int j, int column, float a, float b) {
        if (line) write_two(line + column, a + weight[j][0], b + weight[j][1], left - column);
      });
}

template <class C, class T>
using PanelYProduct = Product<C, T, 1, Rows<C, C, true>, Rows<C, C, false>>;

template <class C, class T>
__global__ void __launch_bounds__(T::kThreads, resident<C, T>())
    panel_y_kernel(Call q, Projection p, Block block, const C* __restrict__ panel) {
  const int e_blocks = (block.e_size + T::kN - 1) / T::kN;
  const int tile = blockIdx.x / e_blocks, e0 = blockIdx.x % e_blocks * T::kN;
  if (tile >= tile_count(q.groups)) return;
  const TileOfRows rows = tile_of(q.batch, q.groups, tile);
  const int u = rows.context - block.u_begin, here = least(rows.end - rows.begin, T::kM);
  if (u < 0 || u >= block.u_size) return;
  const int* order = order_of(q.groups);
  const int d_in = static_cast<int>(q.d_in);
  const Rows<C, C, true> a{elements<C>(q.x), q.d_in, order, rows.begin, here, d_in};
  const C* weights = panel + static_cast<int64_t>(u) * d_in * block.e_size + e0;
  const Rows<C, C, false> b{weights, block.e_size, nullptr, 0, d_in, block.e_size - e0};
  Sums<T> sums;
  sums.clear();
  PanelYProduct<C, T>::add(sums, a, b, d_in, q.tf32);
  const int left = block.e_size - e0;
  const int64_t e = block.e_begin + e0;
  float bias[T::kColumns][2];
  Sums<T>::columns([&](int j, int column) { read_two<C>(bias[j], p.bias, e + column, 1, left - column); });
  C* y = reinterpret_cast<C*>(p.rows) + e;
  sums.rows([&](int r) { return r < here ? y + row_of(order, rows.begin + r) * p.d_out : nullptr; },
            [&](C* line, int j, int column, float a, float b) {
              if (line) write_two(line + column, a + bias[j][0], b + bias[j][1], left - column);
            });
}

template <class C, class T>
using PanelGProduct = Product<C, T, 1, Rows<C, C, false>, Rows<C, C, false>>;

template <class C, class T>
__global__ void __launch_bounds__(T::kThreads, resident<C, T>())
    panel_g_kernel(Call q, Projection p, Block block, C* __restrict__ products) {
  const int u = blockIdx.y;
  if (block.u_begin + u >= context_count(q.groups)) return;
  const int e_blocks = (block.e_size + T::kN - 1) / T::kN;
  const int d0 = blockIdx.x / e_blocks * T::kM, e0 = blockIdx.x % e_blocks * T::kN;
  const Range range = range_of(q.batch, q.groups, block.u_begin + u);
  const int rows = range.end - range.begin;
  const int* order = order_of(q.groups);
  const Rows<C, C, false> a{elements<C>(q.x) + block.d_begin + d0, q.d_in, order, range.begin, rows, block.d_size - d0};
  const Rows<C, C, false> b{
      reinterpret_cast<const C*>(p.rows) + block.e_begin + e0, p.d_out, order, range.begin, rows, block.e_size - e0};
  Sums<T> sums;
  sums.clear();
  PanelGProduct<C, T>::add(sums, a, b, rows, q.tf32);
  const int left = block.e_size - e0;
  C* to = products + (static_cast<int64_t>(u) * block.d_size + d0) * block.e_size + e0;
  sums.rows([&](int d) { return d0 + d < block.d_size ? to + static_cast<int64_t>(d) * block.e_size : nullptr; },
            [&](C* line, int, int column, float a, float b) {
              if (line) write_two(line + column, a, b, left - column);
            });
}

template <class C, class T>
using PanelDxProduct = Product<C, T, 1, Rows<C, C, true>, Rows<C, C, true>>;

// sums: [N, D_BLOCK] in float32, of earlier launches where `started`, for later ones where not `last`.
template <class C, class T>
__global__ void __launch_bounds__(T::kThreads, resident<C, T>())
    panel_dx_kernel(Call q, Projection p, Block block, const C* __restrict__ panel, float* sums_at, bool started,
                    bool last) {
  const int d_blocks = (block.d_size + T::kN - 1) / T::kN;
  const int tile = blockIdx.x / d_blocks, d0 = blockIdx.x % d_blocks * T::kN;
  if (tile >= tile_count(q.groups)) return;
  const TileOfRows rows = tile_of(q.batch, q.groups, tile);
  const int u = rows.context - block.u_begin, here = least(rows.end - rows.begin, T::kM);
  if (u < 0 || u >= block.u_size) return;
  const int* order = order_of(q.groups);
  const Rows<C, C, true> a{
      reinterpret_cast<const C*>(p.rows) + block.e_begin, p.d_out, order, rows.begin, here, block.e_size};
  const C* weights = panel + (static_cast<int64_t>(u) * block.d_size + d0) * block.e_size;
  const Rows<C, C, true> b{weights, block.e_size, nullptr, 0, block.d_size - d0, block.e_size};
  Sums<T> sums;
  sums.clear();
  PanelDxProduct<C, T>::add(sums, a, b, block.e_size, q.tf32);
  const int left = block.d_size - d0;
  struct Line {
    float* total;
    C* dx;
  };
  sums.rows(
      [&](int r) -> Line {
        if (r >= here) return {nullptr, nullptr};
        const int64_t row = row_of(order, rows.begin + r);
        return {sums_at + row * block.d_size + d0, reinterpret_cast<C*>(q.dx) + row * q.d_in + block.d_begin + d0};
      },
      [&](Line line, int, int column, float a, float b) {
        if (!line.dx || column >= left) return;
        if (started) {
          a += line.total[column];
          if (column + 1 < left) b += line.total[column + 1];
        }
        if (last) {
          write_two(line.dx + column, a, b, left - column);
        } else {
          write_two(line.total + column, a, b, left - column);
        }
      });
}

template <class P, class C, class T, int planes>
using PanelDbilinearProduct = Product<P, T, planes, Rows<P, C, false>, Contexts<P, C, false, planes>>;

// sums: [D_BLOCK, E_BLOCK, K + 1] in float32, of earlier groups where `started`, for later ones where not `last`.
template <class P, class C, class T, int planes>
__global__ void __launch_bounds__(T::kThreads, resident<P, T>())
    panel_dbilinear_kernel(Call q, Projection p, Block block, const C* __restrict__ products, float* sums_at,
                           bool started, bool last) {
  const int e_blocks = (block.e_size + T::kM - 1) / T::kM;
  const int row = blockIdx.x / e_blocks, e0 = blockIdx.x % e_blocks * T::kM, k0 = blockIdx.y * T::kN;
  const int count = least(context_count(q.groups) - block.u_begin, block.u_size);
  const int context_dim = static_cast<int>(q.context_dim);
  const int64_t each = static_cast<int64_t>(block.d_size) * block.e_size, d = block.d_begin + row;
  const C* from = products + static_cast<int64_t>(row) * block.e_size + e0;
  const int64_t *st = p.dbilinear.strides, *sw = p.dweight.strides;
  float* total = sums_at + (static_cast<int64_t>(row) * block.e_size + e0) * (context_dim + 1);
  if (p.dbilinear.data && k0 < context_dim) {
    const int* slots = q.groups.uniform ? nullptr : q.groups.buffer + 2;
    const Rows<P, C, false> a{from, each, nullptr, 0, count, block.e_size - e0};
    const Contexts<P, C, false, planes> b{q.context, q.context_dim, slots, block.u_begin, count, k0};
    Sums<T> sums;
    sums.clear();
    PanelDbilinearProduct<P, C, T, planes>::add(sums, a, b, count > 0 ? count : 0, q.tf32);
    const int left = context_dim - k0;
    const int64_t to = d * st[0] + (block.e_begin + e0) * st[1] + k0 * st[2];
    sums.rows([](int e) { return e; },
              [&](int e, int, int k, float a, float b) {
                if (e0 + e >= block.e_size || k >= left) return;
                float* at = total + static_cast<int64_t>(e) * (context_dim + 1) + k0 + k;
                if (started) {
                  a += at[0];
                  if (k + 1 < left) b += at[1];
                }
                if (last) {
                  write_two<C>(p.dbilinear, to + e * st[1] + k * st[2], st[2], a, b, left - k);
                } else {
                  write_two(at, a, b, left - k);
                }
              });
  }
  if (p.dweight.data && k0 == 0) {
    for (int e = threadIdx.x; e < T::kM && e0 + e < block.e_size; e += T::kThreads) {
      float sum = 0;
      for (int u = 0; u < count; ++u) sum += to_float(from[u * each + e]);
      float* at = total + static_cast<int64_t>(e) * (context_dim + 1) + context_dim;
      if (started) sum += *at;
      if (last) {
        write<C>(p.dweight, d * sw[0] + (block.e_begin + e0 + e) * sw[1], sum);
      } else {
        *at = sum;
      }
    }
  }
}

template <class P, class C, class T, int planes>
using PanelDcontextProduct = Product<P, T, planes, ProductsOfPairs<P, C>, BilinearByPairs<P, C, planes>>;

// partial [ranges, limit, K], added to; a range is `rows` rows of the block's D by one of `parts` of its columns.
template <class P, class C, class T, int planes>
__global__ void __launch_bounds__(T::kThreads, resident<P, T>())
    panel_dcontext_kernel(Call q, Projection p, Block block, const C* __restrict__ products,
                          float* __restrict__ partial, int rows, int parts, int columns) {
  const int u0 = blockIdx.x * T::kM, k0 = blockIdx.y * T::kN;
  const int first = blockIdx.z / parts * rows, e0 = blockIdx.z % parts * columns;
  const int count = least(context_count(q.groups) - block.u_begin, block.u_size);
  if (u0 >= count || e0 >= block.e_size) return;
  const int64_t each = static_cast<int64_t>(block.d_size) * block.e_size, *st = p.bilinear.strides;
  const int d_size = least(rows, block.d_size - first), context_dim = static_cast<int>(q.context_dim);
  const Pairs<P> pairs{least(columns, block.e_size - e0)};
  const C* from = products + u0 * each + static_cast<int64_t>(first) * block.e_size + e0;
  const ProductsOfPairs<P, C> a{from, each, block.e_size, count - u0, d_size, pairs};
  const int64_t begin =
      (static_cast<int64_t>(block.d_begin) + first) * st[0] + (block.e_begin + e0) * st[1] + k0 * st[2];
  const BilinearByPairs<P, C, planes> b{p.bilinear, begin, st[0], st[1], st[2], context_dim - k0, d_size, pairs};
  Sums<T> sums;
  sums.clear();
  PanelDcontextProduct<P, C, T, planes>::add(sums, a, b, pairs.depth(d_size), q.tf32);
  sums.each([&](int u, int k, float sum) {
    if (u0 + u >= count || k0 + k >= context_dim) return;
    partial[(static_cast<int64_t>(blockIdx.z) * q.groups.limit + block.u_begin + u0 + u) * context_dim + k0 + k] += sum;
  });
}

// How a block sums terms that lie far apart: 32 neighbours by groups of threads that share the terms.
constexpr int kSumGroups = 8, kSumThreads = 32 * kSumGroups;
constexpr size_t kSumShared = kSumThreads * sizeof(float);

// Σ term(i), i < count, for the threads of the first group; all threads together.
template <class F>
__device__ __forceinline__ float sum_of(int64_t count, F term) {
  float* parts = reinterpret_cast<float*>(shared_memory());
  const int group = threadIdx.x / 32;
  float sum = 0;
  for (int64_t i = group; i < count; i += kSumGroups) sum += term(i);
  parts[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  if (group == 0)
    for (int g = 0; g < kSumGroups; ++g) sum += parts[32 * g + threadIdx.x];
  return sum;
}

// dcontext of a context: its partial sums, in a fixed order.
template <class C>
__global__ void __launch_bounds__(kSumThreads)
    panel_dcontext_sum_kernel(Call q, const float* __restrict__ partial, int ranges) {
  const int u = blockIdx.x;
  if (u >= context_count(q.groups)) return;
  const int64_t k = static_cast<int64_t>(blockIdx.y) * 32 + threadIdx.x % 32, step = q.groups.limit * q.context_dim;
  const bool there = k < q.context_dim;
  const float* from = partial + u * q.context_dim + k;
  const float sum = sum_of(ranges, [&](int64_t r) { return there ? from[r * step] : 0.0f; });
  if (there && threadIdx.x < 32) write<C>(dcontext_of(q), slot_of(q.groups, u) * q.context_dim + k, sum);
}

}  // namespace ctxkern
