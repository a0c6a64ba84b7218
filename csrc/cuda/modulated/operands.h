// Operands of the products of contexts with parameters, beside those of runtime/operands.h.
#pragma once

#include "../runtime/operands.h"
#include "call.h"

namespace ctxkern {

template <class C, class H>
__device__ __forceinline__ void read_parameter(float (&values)[kChunk<C>], const Operand& p, int64_t at, int valid) {
  with_elements<H>(p, [&](const auto* data) { read_chunk<C>(values, data + at, 1, valid); });
}

// The context table [F, K], by contexts of a group or by rows of x; K along the sum, or the columns.
template <class C, class H, bool along_sum, int planes = 1>
struct Contexts {
  static constexpr bool kAlongSum = along_sum;
  static constexpr bool kPlain = std::is_same_v<C, H> && planes == 1, kOrders = !along_sum;
  Operand table;
  int64_t context_dim;
  const int* slots;  // null: in place
  int first, rows, k_begin;

  __device__ __forceinline__ bool plain() const {
    if (table.dtype != kCode<C> || !in_chunks(elements<C>(table) + k_begin, context_dim)) return false;
    return along_sum ? rows > 0 : context_dim - k_begin >= kChunk<C>;
  }
  __device__ __forceinline__ bool ordered() const { return slots != nullptr; }
  __device__ __forceinline__ const C* from(int line, int part) const {
    line = first + (along_sum ? least(line, rows - 1) : line);
    const int64_t row = slots ? slots[line] : line, most = context_dim - k_begin - kChunk<C>;
    return elements<C>(table) + k_begin + row * context_dim + (along_sum ? part : least(part, most));
  }
  __device__ __forceinline__ int64_t step() const { return along_sum ? kDepth<C> : kDepth<C> * context_dim; }

  __device__ __forceinline__ void chunk(C* to, int plane, int at, int k) const {
    const int row = along_sum ? at : k, column = (along_sum ? k : at) + k_begin;
    const int valid = row < rows ? static_cast<int>(context_dim) - column : 0;
    const int64_t line = row < rows ? (slots ? slots[first + row] : first + row) : 0;
    load_parameter<planes, C, H>(to, plane, table, line * context_dim + (valid > 0 ? column : 0), 1, valid);
  }
};

// The sum over pairs (i, j), j < inner: i after i, each filled up to whole chunks.
template <class C>
struct Pairs {
  int inner, padded;
  uint32_t reciprocal;  // 2³² / padded, rounded up

  __device__ __forceinline__ explicit Pairs(int inner)
      : inner(inner),
        padded((inner + kChunk<C> - 1) / kChunk<C> * kChunk<C>),
        reciprocal(static_cast<uint32_t>(((uint64_t{1} << 32) + padded - 1) / padded)) {}

  __device__ __forceinline__ int depth(int outer) const { return outer * padded; }

  // (i, j) of place k, without a division in every chunk; below 2³¹ the estimate is at most one too high.
  __device__ __forceinline__ void split(int k, int& i, int& j) const {
    i = static_cast<int>(static_cast<uint64_t>(k) * reciprocal >> 32);
    j = k - i * padded;
    if (j < 0) {
      --i;
      j += padded;
    }
  }
};

// Bilinear [D, E, K] with the sum over (d, k) and e as n: neighbours along the sum.
template <class C, class H>
struct BilinearOfPairs {
  static constexpr bool kAlongSum = true;
  static constexpr bool kPlain = false;
  Operand bilinear;
  int64_t begin, stride_d, stride_e, stride_k;
  int e_size, d_size;
  Pairs<C> pairs;

  __device__ __forceinline__ void chunk(C* to, int plane, int at, int k) const {
    int d, inner;
    pairs.split(k, d, inner);
    const int valid = at < e_size && d < d_size ? pairs.inner - inner : 0;
    const int64_t from = valid > 0 ? begin + d * stride_d + at * stride_e + inner * stride_k : begin;
    load_parameter<1, C, H>(to, plane, bilinear, from, stride_k, valid);
  }
};

// x ⊗ c, the operand of the outer form: rows n, the sum over (d, k). factors: powers of two that bring the products of a
// row into the range of C, or null.
template <class C, class H>
struct RowsTimesContexts {
  static constexpr bool kAlongSum = true;
  static constexpr bool kPlain = false;
  const H* x;
  int64_t d_in;
  Contexts<C, H, true> contexts;
  int d_begin, d_size;
  Pairs<C> pairs;
  const float* factors;

  __device__ __forceinline__ void chunk(C* to, int plane, int at, int k) const {
    int d, inner;
    pairs.split(k, d, inner);
    const bool there = at < contexts.rows && d < d_size;
    const int64_t row = contexts.first + at;
    const float scale = there ? to_float(x[row * d_in + d_begin + d]) * (factors ? factors[at] : 1.0f) : 0.0f;
    const int64_t line = there ? (contexts.slots ? contexts.slots[row] : row) * contexts.context_dim : 0;
    float values[kChunk<C>];
    read_parameter<C, H>(values, contexts.table, line + inner, there ? pairs.inner - inner : 0);
    CTXKERN_UNROLL for (int i = 0; i < kChunk<C>; ++i) values[i] *= scale;
    write_chunk<1>(to, plane, values);
  }
};

// x[n, d] dy[n, e] for one d: e by rows n, which the sum goes over.
template <class C, class H>
struct RowsTimesRows {
  static constexpr bool kAlongSum = false;
  static constexpr bool kPlain = false;
  const H *x, *dy;
  int64_t d_in, d_out;
  int d, e_begin, e_size, rows;

  __device__ __forceinline__ void chunk(C* to, int plane, int at, int k) const {
    const float scale = k < rows ? to_float(x[k * d_in + d]) : 0.0f;
    float values[kChunk<C>];
    read_chunk<C>(values, dy + k * d_out + e_begin + at, 1, k < rows ? e_size - at : 0);
    CTXKERN_UNROLL for (int i = 0; i < kChunk<C>; ++i) values[i] *= scale;
    write_chunk<1>(to, plane, values);
  }
};

// G [U, D_BLOCK, E_BLOCK] with the sum over (d, e) of a range of D, and its partner, bilinear with k as n.
template <class C, class H>
struct ProductsOfPairs {
  static constexpr bool kAlongSum = true;
  static constexpr bool kPlain = false;
  const H* data;
  int64_t stride_u, stride_d;
  int contexts, d_size;
  Pairs<C> pairs;

  __device__ __forceinline__ void chunk(C* to, int plane, int at, int k) const {
    int d, inner;
    pairs.split(k, d, inner);
    const int valid = at < contexts && d < d_size ? pairs.inner - inner : 0;
    load_chunk<1>(to, plane, data + (valid > 0 ? at * stride_u + d * stride_d + inner : 0), 1, valid);
  }
};

template <class C, class H, int planes>
struct BilinearByPairs {
  static constexpr bool kAlongSum = false;
  static constexpr bool kPlain = false;
  Operand bilinear;
  int64_t begin, stride_d, stride_e, stride_k;
  int k_size, d_size;
  Pairs<C> pairs;

  __device__ __forceinline__ void chunk(C* to, int plane, int at, int k) const {
    int d, inner;
    pairs.split(k, d, inner);
    const int valid = d < d_size && inner < pairs.inner ? k_size - at : 0;
    const int64_t from = valid > 0 ? begin + d * stride_d + inner * stride_e + at * stride_k : begin;
    load_parameter<planes, C, H>(to, plane, bilinear, from, stride_k, valid);
  }
};

}  // namespace ctxkern
