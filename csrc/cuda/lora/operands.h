// Operands of products (product.h) that low-rank updates have, beside those of runtime/operands.h.
#pragma once

#include "../runtime/operands.h"
#include "dropout.h"

namespace ctxkern {

// Rows of x, or what dropout leaves of them; column: of x, where the matrix begins.
template <class C, class S, bool along_sum>
struct SeenRows : Rows<C, S, along_sum> {
  using Base = Rows<C, S, along_sum>;
  Dropout dropout;
  int column;

  __device__ __forceinline__ SeenRows(const Base& rows, Dropout dropout, int column)
      : Base(rows), dropout(dropout), column(column) {}

  __device__ __forceinline__ bool plain() const { return !dropout.kept_from && Base::plain(); }

  __device__ __forceinline__ void chunk(C* to, int plane, int at, int k) const {
    if (!dropout.kept_from) return Base::chunk(to, plane, at, k);
    const int row = along_sum ? at : k, begin = along_sum ? k : at;
    const int valid = row < this->rows ? this->columns - begin : 0;
    float values[kChunk<C>] = {};
    if (valid > 0) {
      const int64_t line = row_of(this->order, this->first + row);
      read_chunk<C>(values, this->data + line * this->stride + begin, 1, valid);
      const RowDraws draws = dropout.of(line);
    CTXKERN_UNROLL for (int i = 0; i < kChunk<C>; ++i)
        if (!draws.kept(column + begin + i)) values[i] = 0;
    }
    write_chunk<1>(to, plane, values);
  }
};

// h or g of a tile's rows in shared memory, lines of whole chunks.
template <class C>
struct Held {
  static constexpr bool kAlongSum = true, kPlain = false;
  const C* data;
  int line, depth;

  __device__ __forceinline__ void chunk(C* to, int, int at, int k) const {
    C values[kChunk<C>];
    CTXKERN_UNROLL for (int i = 0; i < kChunk<C>; ++i) values[i] = from_float<C>(0.0f);
    if (k < depth) load_vector(values, data + at * line + k);
    store_vector(to, values);
  }
};

}  // namespace ctxkern
