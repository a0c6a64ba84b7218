// Operands of products (product.h) that any family has: rows of matrices, brought together or in place, and parameters with
// strides.
#pragma once

#include <type_traits>

#include "elements.h"
#include "groups.h"
#include "product.h"

namespace ctxkern {

// Elements of a parameter, whatever its dtype.
template <int planes, class C, class H>
__device__ __forceinline__ void load_parameter(C* to, int plane, const Operand& p, int64_t at, int64_t stride,
                                               int valid) {
  with_elements<H>(p, [&](const auto* data) { load_chunk<kStored<C, planes>>(to, plane, data + at, stride, valid); });
}

// A row-major matrix: m or n are its rows (along the sum), or its columns.
template <class C, class S, bool along_sum>
struct Rows {
  static constexpr bool kAlongSum = along_sum;
  static constexpr bool kPlain = std::is_same_v<C, S>, kOrders = !along_sum;
  const S* data;
  int64_t stride;
  const int* order;  // row `first + r` of the matrix is order[first + r] of memory; null: in place
  int first, rows, columns;

  __device__ __forceinline__ bool plain() const {
    return (along_sum ? rows > 0 : columns >= kChunk<C> && columns % kChunk<C> == 0) && in_chunks(data, stride);
  }
  __device__ __forceinline__ bool ordered() const { return order != nullptr; }
  __device__ __forceinline__ const C* from(int line, int part) const {
    line = first + (along_sum ? least(line, rows - 1) : line);
    const int64_t row = order ? order[line] : line;
    return data + row * stride + (along_sum ? part : least(part, columns - kChunk<C>));
  }
  __device__ __forceinline__ int64_t step() const { return along_sum ? kDepth<C> : kDepth<C> * stride; }

  __device__ __forceinline__ void chunk(C* to, int plane, int at, int k) const {
    const int row = along_sum ? at : k, column = along_sum ? k : at;
    const int valid = row < rows ? columns - column : 0;
    const int64_t line = row < rows ? (order ? order[first + row] : first + row) : 0;
    load_chunk<1>(to, plane, data + line * stride + (valid > 0 ? column : 0), 1, valid);
  }
};

// A parameter [n, k] with strides: neighbours along the sum, or along n.
template <class C, class H, bool along_sum, int planes = 1>
struct Strided {
  static constexpr bool kAlongSum = along_sum;
  static constexpr bool kPlain = std::is_same_v<C, H> && planes == 1, kOrders = false;
  Operand parameter;
  int64_t begin, stride_n, stride_k;
  int n, depth;

  __device__ __forceinline__ bool plain() const {
    if (parameter.dtype != kCode<C> || (along_sum ? stride_k : stride_n) != 1) return false;
    if (along_sum ? n == 0 : n < kChunk<C> || n % kChunk<C>) return false;
    return in_chunks(elements<C>(parameter) + begin, along_sum ? stride_n : stride_k);
  }
  __device__ __forceinline__ const C* from(int line, int part) const {
    const C* data = elements<C>(parameter) + begin;
    if constexpr (along_sum) return data + least(line, n - 1) * stride_n + part;
    return data + line * stride_k + least(part, n - kChunk<C>);
  }
  __device__ __forceinline__ int64_t step() const { return along_sum ? kDepth<C> : kDepth<C> * stride_k; }

  __device__ __forceinline__ void chunk(C* to, int plane, int at, int k) const {
    const int other = along_sum ? at : k, there = along_sum ? n : depth;
    const int valid = other < there ? (along_sum ? depth - k : n - at) : 0;
    const int64_t from = valid > 0 ? begin + at * stride_n + k * stride_k : begin;
    load_parameter<planes, C, H>(to, plane, parameter, from, along_sum ? stride_k : stride_n, valid);
  }
};

}  // namespace ctxkern
