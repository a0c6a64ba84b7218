// Outer: the product of a row of x with its context is the operand, and no weight is made at all.
//
//   outer_y          y[n, e] = Σ_d Σ_k (x[n, d] c[n, k]) bilinear[d, e, k] + Σ_d x[n, d] weight[d, e] + bias[e]
//   outer_dx         z[n, k] = Σ_e dy[n, e] bilinear[d, e, k] for one d
//                    dx[n, d] = Σ_k z[n, k] c[n, k]    dcontext[n, k] += x[n, d] z[n, k]
//   outer_dbilinear  dbilinear[d, e, k] = Σ_n (x[n, d] dy[n, e]) c[n, k]
//   outer_dweight    dweight = xᵀ dy, and outer_weight_dx dy weightᵀ, which outer_dx adds to: of Triton one matmul
//
// Rows stay in their order. Sums that several blocks share are kept apart and added in their order. Names of
// dtypes as in panel.h; in outer_dbilinear_kernel H is that of x and C that of products.
#pragma once

#include "panel.h"

namespace ctxkern {

// Few rows × columns; rows × all of a block of K, so that a warp has whole rows, and of a small one.
using FewTile = Tile<16, 128, 1, 4>;
using OuterDxTile = Tile<64, 64, 4, 1>;
using NarrowOuterDxTile = Tile<64, 32, 4, 1>;

template <class P, class C, class T>
using OuterYProduct = Product<P, T, 1, RowsTimesContexts<P, C>, BilinearOfPairs<P, C>>;
template <class P, class C, class T>
using OuterYWeightProduct = Product<P, T, 1, Rows<P, C, true>, Strided<P, C, false>>;

// Whether products of x and context are brought into the range of P by a factor for each row, and where they lie.
template <class P>
constexpr bool kScaled = kCode<P> == Dtype::f16;
template <class P, class C, class T>
constexpr size_t kStaged =
    OuterYProduct<P, C, T>::kShared > OuterYWeightProduct<P, C, T>::kShared ? OuterYProduct<P, C, T>::kShared
                                                                            : OuterYWeightProduct<P, C, T>::kShared;
template <class P, class C, class T>
constexpr size_t kOuterShared = kStaged<P, C, T> + (kScaled<P> ? T::kM * sizeof(float) : 0);

// The power of two that brings |x c| of a row below 2^15, by all threads together.
template <class C, int kThreads>
__device__ __forceinline__ void find_factors(float* factors, const Call& q, const int* slots, int64_t n0, int rows,
                                             int d0, int d_size) {
  // a warp for each row
  for (int r = threadIdx.x / 32; r < rows; r += kThreads / 32) {
    const int lane = threadIdx.x % 32;
    const int64_t line = (slots ? slots[n0 + r] : n0 + r) * q.context_dim;
    float x = 0, c = 0;
    for (int d = lane; d < d_size; d += 32) x = fmaxf(x, fabsf(to_float(elements<C>(q.x)[(n0 + r) * q.d_in + d0 + d])));
    for (int64_t k = lane; k < q.context_dim; k += 32) c = fmaxf(c, fabsf(read<C>(q.context, line + k)));
    for (int mask = 16; mask; mask /= 2) {
      x = fmaxf(x, exchange(x, mask));
      c = fmaxf(c, exchange(c, mask));
    }
    int exponent_x, exponent_c;
    frexpf(x, &exponent_x);
    frexpf(c, &exponent_c);
    const bool usual = x > 0 && c > 0 && x <= 65504.0f && c <= 65504.0f;
    if (lane == 0) factors[r] = usual ? ldexpf(1.0f, 15 - exponent_x - exponent_c) : 1.0f;
  }
  __syncthreads();
}

// sums [splits, N, E] in float32 where there are several splits of D, of d_step rows each.
template <class P, class C, class T>
__global__ void __launch_bounds__(T::kThreads, resident<P, T>())
    outer_y_kernel(Call q, Projection p, float* __restrict__ split_sums, int d_step) {
  // rows side by side: they read the same of bilinear
  const unsigned n_blocks = static_cast<unsigned>((q.batch.tokens + T::kM - 1) / T::kM);
  const int64_t n0 = static_cast<int64_t>(blockIdx.x % n_blocks) * T::kM;
  const int64_t e0 = static_cast<int64_t>(blockIdx.x / n_blocks) * T::kN;
  const int d0 = blockIdx.y * d_step, d_size = least(d_step, q.d_in - d0);
  const int rows = least(T::kM, q.batch.tokens - n0), columns = least(T::kN, p.d_out - e0);
  const int64_t *st = p.bilinear.strides, *sw = p.weight.strides;
  const C* x = elements<C>(q.x);
  const bool tf32 = rounds<P, C>(q);
  float* factors = kScaled<P> ? reinterpret_cast<float*>(shared_memory() + kStaged<P, C, T>) : nullptr;
  Sums<T> sums;
  sums.clear();
  if (q.context_dim) {
    const Pairs<P> pairs{static_cast<int>(q.context_dim)};
    const Contexts<P, C, true> contexts{q.context, q.context_dim, q.slots, static_cast<int>(n0), rows, 0};
    if constexpr (kScaled<P>) find_factors<C, T::kThreads>(factors, q, q.slots, n0, rows, d0, d_size);
    const RowsTimesContexts<P, C> a{x, q.d_in, contexts, d0, d_size, pairs, factors};
    const BilinearOfPairs<P, C> b{p.bilinear, d0 * st[0] + e0 * st[1], st[0], st[1], st[2], columns, d_size, pairs};
    OuterYProduct<P, C, T>::add(sums, a, b, pairs.depth(d_size), tf32);
    if constexpr (kScaled<P>)
      sums.rows([&](int r) { return r < rows ? 1.0f / factors[r] : 1.0f; },
                [](float scale, int, int, float& a, float& b) {
                  a *= scale;
                  b *= scale;
                });
  }
  if (p.weight.data) {
    const Rows<P, C, true> a{x + d0, q.d_in, nullptr, static_cast<int>(n0), rows, d_size};
    const Strided<P, C, false> b{p.weight, d0 * sw[0] + e0 * sw[1], sw[1], sw[0], columns, d_size};
    OuterYWeightProduct<P, C, T>::add(sums, a, b, d_size, tf32);
  }
  float bias[T::kColumns][2];
  Sums<T>::columns([&](int j, int column) {
    read_two<C>(bias[j], split_sums ? Operand{} : p.bias, e0 + column, 1, columns - column);
  });
  const int64_t first = n0 * p.d_out + e0;
  sums.rows([&](int r) { return r < rows ? first + r * p.d_out : -1; },
            [&](int64_t line, int j, int column, float a, float b) {
              if (line < 0) return;
              float* split = split_sums + blockIdx.y * q.batch.tokens * p.d_out;
              if (split_sums) return write_two(split + line + column, a, b, columns - column);
              write_two(reinterpret_cast<C*>(p.rows) + line + column, a + bias[j][0], b + bias[j][1], columns - column);
            });
}

template <class C>
__global__ void outer_y_sum_kernel(Call q, Projection p, const float* __restrict__ split_sums, int splits) {
  const int64_t size = q.batch.tokens * p.d_out, at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= size) return;
  float sum = 0;
  for (int s = 0; s < splits; ++s) sum += split_sums[s * size + at];
  if (p.bias.data) sum += read<C>(p.bias, at % p.d_out);
  reinterpret_cast<C*>(p.rows)[at] = from_float<C>(sum);
}

template <class P, class C, class T, int planes>
using OuterDxProduct = Product<P, T, planes, Rows<P, C, true>, Strided<P, C, false, planes>, (planes > 1)>;

// For one block of K, k0 on, of one projection. sums [N, D] in float32: dx so far; partial [splits, N, K]: dcontext.
template <class P, class C, class T, int planes>
__global__ void __launch_bounds__(T::kThreads, sizeof(P) == 2 && (planes == 1 || T::kN < 64) ? 3 : 2)
    outer_dx_kernel(Call q, Projection p, float* __restrict__ dx_sums, float* __restrict__ partial, int k0, int d_step,
                    bool started, bool last, bool added) {
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * T::kM;
  const int rows = least(T::kM, q.batch.tokens - n0), context_dim = static_cast<int>(q.context_dim);
  const int d0 = blockIdx.y * d_step, d1 = d0 + least(d_step, q.d_in - d0);
  const int64_t* st = p.bilinear.strides;
  const Rows<P, C, true> a{reinterpret_cast<const C*>(p.rows), p.d_out, nullptr, static_cast<int>(n0), rows,
                           static_cast<int>(p.d_out)};
  // c and the sums of dcontext, as a thread has its part of z
  Sums<T> c, dcontext;
  const int* slots = q.slots;
  const int64_t split = static_cast<int64_t>(blockIdx.y) * q.batch.tokens;
  dcontext.clear();
  c.each([&](int r, int k, float& value) {
    const bool there = q.dx && r < rows && k0 + k < context_dim;
    value = there ? read<C>(q.context, (slots ? slots[n0 + r] : n0 + r) * q.context_dim + k0 + k) : 0.0f;
  });
  if (partial && added)
    dcontext.each([&](int r, int k, float& sum) {
      if (r < rows && k0 + k < context_dim) sum = partial[(split + n0 + r) * context_dim + k0 + k];
    });
  for (int d = d0; d < d1; ++d) {
    Sums<T> z;
    z.clear();
    const Strided<P, C, false, planes> b{p.bilinear, d * st[0] + k0 * st[2], st[2],
                                         st[1],      context_dim - k0,       static_cast<int>(p.d_out)};
    OuterDxProduct<P, C, T, planes>::add(z, a, b, static_cast<int>(p.d_out), q.tf32);
  CTXKERN_UNROLL for (int i = 0; i < T::kRows; ++i)
      CTXKERN_UNROLL for (int h = 0; h < 2; ++h) {
        const int64_t r = threadIdx.x / 32 * (T::kM / T::kWarpsM) + 16 * i + 8 * h + threadIdx.x % 32 / 4;
        const float x = partial && r < rows ? to_float(elements<C>(q.x)[(n0 + r) * q.d_in + d]) : 0.0f;
        float total = 0;
        CTXKERN_UNROLL for (int j = 0; j < T::kColumns; ++j)
          CTXKERN_UNROLL for (int w = 0; w < 2; ++w) {
            total += z.at[i][j][2 * h + w] * c.at[i][j][2 * h + w];
            dcontext.at[i][j][2 * h + w] += x * z.at[i][j][2 * h + w];
          }
        total += exchange(total, 1);
        total += exchange(total, 2);
        if (q.dx && r < rows && threadIdx.x % 4 == 0) {
          const int64_t at = (n0 + r) * q.d_in + d;
          if (started) total += dx_sums[at];
          if (last) {
            reinterpret_cast<C*>(q.dx)[at] = from_float<C>(total);
          } else {
            dx_sums[at] = total;
          }
        }
      }
  }
  if (partial)
    dcontext.each([&](int r, int k, float& sum) {
      if (r < rows && k0 + k < context_dim) partial[(split + n0 + r) * context_dim + k0 + k] = sum;
    });
}

// dcontext of a context: the partial sums of its rows, in a fixed order.
template <class C>
__global__ void __launch_bounds__(kSumThreads)
    outer_dcontext_sum_kernel(Call q, const float* __restrict__ partial, int splits) {
  const int u = blockIdx.x;
  if (u >= context_count(q.groups)) return;
  const Range range = range_of(q.batch, q.groups, u);
  const int* order = order_of(q.groups);
  const int64_t k = static_cast<int64_t>(blockIdx.y) * 32 + threadIdx.x % 32, rows = range.end - range.begin;
  const bool there = k < q.context_dim;
  const float sum = sum_of(splits * rows, [&](int64_t i) {
    const int64_t row = i / splits, split = i - row * splits;
    return there ? partial[(split * q.batch.tokens + row_of(order, range.begin + row)) * q.context_dim + k] : 0.0f;
  });
  if (there && threadIdx.x < 32) write<C>(dcontext_of(q), slot_of(q.groups, u) * q.context_dim + k, sum);
}

template <class C, class H, class T>
using OuterDbilinearProduct = Product<C, T, 1, RowsTimesRows<C, H>, Contexts<C, H, false>>;

template <class C, class H, class T>
__global__ void __launch_bounds__(T::kThreads, resident<C, T>())
    outer_dbilinear_kernel(Call q, Projection p) {
  const int e_blocks = static_cast<int>((p.d_out + T::kM - 1) / T::kM);
  const int d = blockIdx.x / e_blocks, e0 = blockIdx.x % e_blocks * T::kM, k0 = blockIdx.y * T::kN;
  const int columns = least(T::kM, p.d_out - e0), rows = static_cast<int>(q.batch.tokens);
  const RowsTimesRows<C, H> a{
      elements<H>(q.x), reinterpret_cast<const H*>(p.rows), q.d_in, p.d_out, d, e0, columns, rows};
  const Contexts<C, H, false> b{q.context, q.context_dim, q.slots, 0, rows, k0};
  Sums<T> sums;
  sums.clear();
  OuterDbilinearProduct<C, H, T>::add(sums, a, b, rows, q.tf32);
  const int64_t *st = p.dbilinear.strides, to = d * st[0] + e0 * st[1] + k0 * st[2];
  const int left = least(T::kN, q.context_dim - k0);
  sums.rows([&](int column) { return column < columns ? to + column * st[1] : -1; },
            [&](int64_t line, int, int k, float a, float b) {
              if (line >= 0) write_two<H>(p.dbilinear, line + k * st[2], st[2], a, b, left - k);
            });
}

template <class C>
using OuterDweightProduct = Product<C, SmallTile, 1, Rows<C, C, false>, Rows<C, C, false>>;

// dweight = x^T dy.
template <class C>
__global__ void __launch_bounds__(SmallTile::kThreads, resident<C, SmallTile>())
    outer_dweight_kernel(Call q, Projection p) {
  const int e_blocks = static_cast<int>((p.d_out + SmallTile::kN - 1) / SmallTile::kN);
  const int d0 = blockIdx.x / e_blocks * SmallTile::kM, e0 = blockIdx.x % e_blocks * SmallTile::kN;
  const int rows = static_cast<int>(q.batch.tokens), d_size = least(SmallTile::kM, q.d_in - d0);
  const int columns = least(SmallTile::kN, p.d_out - e0);
  const Rows<C, C, false> a{elements<C>(q.x) + d0, q.d_in, nullptr, 0, rows, d_size};
  const Rows<C, C, false> b{reinterpret_cast<const C*>(p.rows) + e0, p.d_out, nullptr, 0, rows, columns};
  Sums<SmallTile> sums;
  sums.clear();
  OuterDweightProduct<C>::add(sums, a, b, rows, q.tf32);
  const int64_t *sw = p.dweight.strides, to = d0 * sw[0] + e0 * sw[1];
  sums.rows([&](int r) { return r < d_size ? to + r * sw[0] : -1; },
            [&](int64_t line, int, int column, float a, float b) {
              if (line >= 0) write_two<C>(p.dweight, line + column * sw[1], sw[1], a, b, columns - column);
            });
}

template <class P, class C>
using OuterWeightDxProduct = Product<P, SmallTile, 1, Rows<P, C, true>, Strided<P, C, true>>;

// sums [N, D] (+)= dy weight^T.
template <class P, class C>
__global__ void __launch_bounds__(SmallTile::kThreads, resident<P, SmallTile>())
    outer_weight_dx_kernel(Call q, Projection p, float* __restrict__ dx_sums, bool started) {
  const int d_blocks = static_cast<int>((q.d_in + SmallTile::kN - 1) / SmallTile::kN);
  const int64_t n0 = static_cast<int64_t>(blockIdx.x / d_blocks) * SmallTile::kM;
  const int d0 = blockIdx.x % d_blocks * SmallTile::kN, d_out = static_cast<int>(p.d_out);
  const int rows = least(SmallTile::kM, q.batch.tokens - n0), columns = least(SmallTile::kN, q.d_in - d0);
  const Rows<P, C, true> a{reinterpret_cast<const C*>(p.rows), p.d_out, nullptr, static_cast<int>(n0), rows, d_out};
  const int64_t* sw = p.weight.strides;
  const Strided<P, C, true> b{p.weight, d0 * sw[0], sw[0], sw[1], columns, d_out};
  Sums<SmallTile> sums;
  sums.clear();
  OuterWeightDxProduct<P, C>::add(sums, a, b, d_out, rounds<P, C>(q));
  sums.each([&](int r, int column, float sum) {
    if (r >= rows || column >= columns) return;
    float* total = dx_sums + (n0 + r) * q.d_in + d0 + column;
    *total = started ? *total + sum : sum;
  });
}

}  // namespace ctxkern
