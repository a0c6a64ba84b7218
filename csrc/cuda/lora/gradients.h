// Gradients of A and B, from the h and g that lora_dx leaves (kernels.h):
//
//   lora_dab  dA_u[r, d] = s Σ_{n of u} g[n, r] x[n, d]    dB_u[e, r] = s Σ_{n of u} dy[n, e] h[n, r]
//
// Of an adapter with more than `rows` rows a block takes as many at a time, a chunk, and lora_dab_sum adds up the chunks.
// Sums over rows follow the order of an adapter's rows and no others; there are no atomics.
#pragma once

#include "kernels.h"

namespace ctxkern {

// Columns × ranks of dA and dB: of many ranks and of few.
using GradientTile = Tile<64, 64, 2, 2>;
using FewRanksGradientTile = Tile<64, 32, 4, 1>;

// Sums of chunks, of adapters that have several: [places, R · D, E · R], whichever are asked for, each as its gradient.
struct Chunks {
  int64_t rows;  // of a chunk
  int later;     // how many chunks there can be after the first of an adapter
  float* sums;

  __host__ __device__ __forceinline__ int64_t of_a(const LoraCall& q) const { return q.dA ? q.rank * q.d_in : 0; }
  __host__ __device__ __forceinline__ int64_t size(const LoraCall& q) const {
    return of_a(q) + (q.dB ? q.rank * q.d_out : 0);
  }
  // Of a chunk and of the first of its adapter: in every `rows` grouped rows there begin at most one that is not the
  // first, and one that is the first of several.
  __device__ __forceinline__ float* of(const LoraCall& q, int64_t window) const { return sums + 2 * window * size(q); }
  __device__ __forceinline__ float* of_first(const LoraCall& q, int begin) const {
    return sums + (2 * (begin / rows) + 1) * size(q);
  }
};

// The context that has a grouped row; −1 where there is no such row.
__device__ __forceinline__ int context_of(const LoraCall& q, int64_t row) {
  if (q.groups.uniform) return static_cast<int>(row / q.batch.length);
  const int* first = q.groups.buffer + 2 + q.groups.limit;
  int low = 0, high = context_count(q.groups);
  if (row >= first[high]) return -1;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first[middle] <= row ? low : high) = middle;
  }
  return low;
}

// Rows of a chunk of context u, which has them all or not; window: 0 of a first chunk. u is −1 where there is none.
struct Chunk {
  int u, begin, end, window;
  bool alone;
};

// The first chunks of all contexts, then those that are not, by the `rows` grouped rows in which they begin.
__device__ __forceinline__ Chunk chunk_of(const LoraCall& q, const Chunks& chunks, int at) {
  const int window = at < q.groups.limit ? 0 : at - q.groups.limit + 1;
  const int u = window ? context_of(q, window * chunks.rows) : at < context_count(q.groups) ? at : -1;
  if (u < 0) return {-1, 0, 0, 0, false};
  const Range range = range_of(q.batch, q.groups, u);
  const int64_t before = window ? window - range.begin / chunks.rows : 0, begin = range.begin + before * chunks.rows;
  if (window && (before == 0 || begin >= range.end)) return {-1, 0, 0, 0, false};
  const int end = least(begin + chunks.rows, range.end);
  return {u, static_cast<int>(begin), end, window, range.end - range.begin <= chunks.rows};
}

template <class S, class C, class T>
using GradientsProduct = Product<S, T, kPlanes<S, C>, SeenRows<S, C, false>, Rows<S, S, false>>;

// A strip of columns of dAᵀ, or after strips_a of them of dB, for a block of an adapter's ranks and a chunk of its rows.
template <class C, class S, class T>
__global__ void __launch_bounds__(T::kThreads, resident<S, T>())
    lora_dab_kernel(LoraCall q, Chunks chunks, int strips_a, int strips) {
  const int strip = blockIdx.x % strips, r0 = blockIdx.y * T::kN;
  const Chunk chunk = chunk_of(q, chunks, blockIdx.x / strips);
  if (chunk.u < 0) return;
  const bool of_a = strip < strips_a;
  const int c0 = (of_a ? strip : strip - strips_a) * T::kM;
  const int64_t width = of_a ? q.d_in : q.d_out;
  const C* from = of_a ? elements<C>(q.x) : reinterpret_cast<const C*>(q.rows);
  const S* inner = reinterpret_cast<const S*>(of_a ? q.g : q.h) + r0;
  const Adapter adapter = adapter_of(q, chunk.u);
  const int ranks = adapter.rank - r0, rows = chunk.end - chunk.begin, columns = least(T::kM, width - c0);
  Sums<T> sums;
  sums.clear();
  if (ranks > 0) {
    const Rows<S, C, false> a{from + c0, width, order_of(q.groups), chunk.begin, rows, columns};
    const Rows<S, S, false> b{inner, q.rank, nullptr, chunk.begin, rows, ranks};
    const Dropout dropout = of_a ? dropout_of(q) : Dropout{0, 0};
    GradientsProduct<S, C, T>::add(sums, SeenRows<S, C, false>(a, dropout, c0), b, rows, rounds<S, C>(q));
  }
  Operand to{of_a ? q.dA : q.dB, of_a ? q.A.dtype : q.B.dtype, {}};
  const int64_t stride_r = of_a ? width : 1, stride_c = of_a ? 1 : q.rank;
  int64_t at = c0 * stride_c + r0 * stride_r;
  if (chunk.alone) {
    at += adapter.slot * width * q.rank;
  } else {
    float* place = chunk.window ? chunks.of(q, chunk.window) : chunks.of_first(q, chunk.begin);
    to = {reinterpret_cast<char*>(of_a ? place : place + chunks.of_a(q)), Dtype::f32, {}};
  }
  const int left = least(T::kN, q.rank - r0);
  // zeros behind the adapter's own rank
  sums.rows([&](int column) { return column < columns ? at + column * stride_c : -1; },
            [&](int64_t line, int, int r, float a, float b) {
              if (line < 0) return;
              a = r < ranks ? a * adapter.scale : 0.0f;
              b = r + 1 < ranks ? b * adapter.scale : 0.0f;
              write_two<C>(to, line + r * stride_r, stride_r, a, b, left - r);
            });
}

constexpr int kDabSumThreads = 256;

// dA and dB of the adapter whose second chunk begins in a window: its chunks in their order, an entry a thread.
template <class C>
__global__ void __launch_bounds__(kDabSumThreads) lora_dab_sum_kernel(LoraCall q, Chunks chunks, int pieces) {
  const Chunk second = chunk_of(q, chunks, q.groups.limit + blockIdx.x / pieces);
  if (second.u < 0) return;
  const Range range = range_of(q.batch, q.groups, second.u);
  if (second.begin != range.begin + chunks.rows) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x % pieces) * kDabSumThreads + threadIdx.x;
  const int64_t of_a = chunks.of_a(q), of_b = chunks.size(q) - of_a;
  if (i >= of_a + of_b) return;
  float sum = chunks.of_first(q, range.begin)[i];
  const int64_t last = second.window + (range.end - 1 - second.begin) / chunks.rows;
  for (int64_t w = second.window; w <= last; ++w) sum += chunks.of(q, w)[i];
  const int64_t slot = slot_of(q.groups, second.u);
  const Operand to{i < of_a ? q.dA : q.dB, i < of_a ? q.A.dtype : q.B.dtype, {}};
  write<C>(to, i < of_a ? slot * of_a + i : slot * of_b + i - of_a, sum);
}

}  // namespace ctxkern
