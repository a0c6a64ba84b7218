// Where the sums of a tile go, and how they are written.
#pragma once

#include "vec.h"

namespace ctxkern {
namespace {

struct Also;

// The adds: to panels of vectors without gaps. pairs: two rows of bfloat16 as words, of a panel of four vectors: lane i of the
// first half and of the second. The streams write past the cache: whole vectors, aligned, of one or two.
enum class Store { f32, f32_add, bf16, bf16_add, f16, f16_add, pairs, f32_stream, bf16_stream };

constexpr Store store_of(Dtype dtype) {
  return dtype == Dtype::f32 ? Store::f32 : dtype == Dtype::bf16 ? Store::bf16 : Store::f16;
}

constexpr Store added(Store store) {
  return store == Store::f32 ? Store::f32_add : store == Store::bf16 ? Store::bf16_add : Store::f16_add;
}

constexpr Store add_of(Dtype dtype) { return added(store_of(dtype)); }

struct Out {
  char* data;
  int64_t row;  // bytes
  Store store;
  int64_t lanes;                 // of one or two vectors: those that are written; of four: all
  int64_t half = 0;              // bytes from the first two vectors to the other two
  const float* bias = nullptr;   // [lanes, padded to vectors], added
  const int64_t* map = nullptr;  // row of the output of each row
  const Also* also = nullptr;    // where W takes it

  char* at(int64_t i) const { return data + (map ? map[i] : i) * row; }
};

constexpr int64_t size_of(Store store) {
  return store == Store::f32 || store == Store::f32_add || store == Store::f32_stream ? 4 : 2;
}

// Bytes of an output from which it is written past the cache.
constexpr int64_t kCached = 4 << 20;

inline bool streamable(const Out& out) {
  const int64_t vector = VL * size_of(out.store);
  return (reinterpret_cast<uintptr_t>(out.data) | static_cast<uintptr_t>(out.row)) % vector == 0 && out.lanes % VL == 0;
}

// Whether its streams write whole lines one after another. Parts of a line that come apart reach memory apart.
inline bool streams_lines(const Out& out) {
  return streamable(out) && (out.lanes <= 2 * VL || (reinterpret_cast<uintptr_t>(out.data) | out.row) % 64 == 0);
}

inline Out streamed(Out out) {
  if (out.store == Store::f32) out.store = Store::f32_stream;
  if (out.store == Store::bf16) out.store = Store::bf16_stream;
  return out;
}

// Rows of sums to rows `row` and on of the output, from lane `lane` on. Of fewer lanes than there are, the last vector is
// cut short.
template <Dtype D, int MR, int NV, class F>
CTXKERN_INLINE void each_row(V (&acc)[MR][NV], const Out& out, int64_t row, int64_t lane, F&& write) {
  char* const data = out.data + lane * size_of(D);
  const int64_t step = out.row;
  const int64_t* const map = out.map;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) write(data + (map ? map[row + i] : row + i) * step, acc[i]);
}

template <Dtype D, int MR, int NV>
CTXKERN_INLINE void put_as(V (&acc)[MR][NV], const Out& out, int64_t row, int64_t lane) {
  constexpr int64_t vector = VL * size_of(D);
  const int64_t last = NV == 4 ? VL : out.lanes - lane - (NV - 1) * VL;
  if (last >= VL) {
    each_row<D>(acc, out, row, lane, [&](char* c, V(&v)[NV]) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j)
        store_as<D>(c + (NV == 4 && j >= 2 ? out.half + (j - 2) * vector : j * vector), v[j]);
    });
  } else {
    each_row<D>(acc, out, row, lane, [&](char* c, V(&v)[NV]) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int j = 0; j < NV - 1; ++j) store_as<D>(c + j * vector, v[j]);
      store_as_first<D>(c + (NV - 1) * vector, v[NV - 1], last);
    });
  }
}

template <Dtype D, int MR, int NV>
CTXKERN_INLINE void add_as(V (&acc)[MR][NV], const Out& out, int64_t row, int64_t lane) {
  const int64_t lanes = out.lanes - lane;
  each_row<D>(acc, out, row, lane, [&](char* c, V(&v)[NV]) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) v[j] += load_f32_first<D>(c + j * VL * size_of(D), lanes - j * VL);
  });
  put_as<D>(acc, out, row, lane);
}

template <int MR, int NV>
CTXKERN_INLINE void put(V (&acc)[MR][NV], const Out& out, int64_t row, int64_t lane) {
  switch (out.store) {
    case Store::f32_add: return add_as<Dtype::f32>(acc, out, row, lane);
    case Store::bf16_add: return add_as<Dtype::bf16>(acc, out, row, lane);
    case Store::f16_add: return add_as<Dtype::f16>(acc, out, row, lane);
    case Store::f32: return put_as<Dtype::f32>(acc, out, row, lane);
    case Store::bf16: return put_as<Dtype::bf16>(acc, out, row, lane);
    case Store::f16: return put_as<Dtype::f16>(acc, out, row, lane);
    case Store::f32_stream:
      return each_row<Dtype::f32>(acc, out, row, lane, [&](char* c, V(&v)[NV]) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) stream_as<Dtype::f32>(c + j * VL * 4, v[j]);
      });
    case Store::bf16_stream:
      return each_row<Dtype::bf16>(acc, out, row, lane, [&](char* c, V(&v)[NV]) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) stream_as<Dtype::bf16>(c + j * VL * 2, v[j]);
      });
    case Store::pairs:
      if constexpr (NV == 4) {
        each_row<Dtype::bf16>(acc, out, row, lane, [&](char* c, V(&v)[NV]) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int j = 0; j < 2; ++j) store(c + j * VL * 4, pair(v[j], v[j + 2]));
        });
      }
  }
}

}  // namespace
}  // namespace ctxkern
