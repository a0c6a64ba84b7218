// What a call is: sizes, strides and pointers, given to every kernel by value.
#pragma once

#include "device.h"

namespace ctxkern {

constexpr int kMostProjections = 3;

// A parameter: in the dtype of x, or float32 beside a half.
struct Parameter {
  void* data;
  int wide;
};

// weight [D, E], bilinear [D, E, K], bias [E], y or dy [N, E], and gradients of the first two; null where absent.
struct Projection {
  Parameter weight, bilinear, bias, dweight, dbilinear;
  void* rows;
  int64_t d_out;
  int64_t weight_strides[2], bilinear_strides[3], dweight_strides[2], dbilinear_strides[3];
};

// Which rows belong to which context: see groups.h.
struct Groups {
  int* buffer;
  int limit, tiles, block, uniform, ordered;
};

struct Problem {
  const void* x;         // [N, D]
  Parameter context;     // [F, K]
  Parameter dcontext;    // [F, K], zeros at first
  void* dx;              // [N, D]
  const int64_t* index;  // [B]
  const int* bounds;     // [B + 1]
  int64_t tokens, d_in, context_dim, table, sequences, length;
  int64_t per_token, outer, dtype, tf32, projections, workspace_bytes;
  Projection projection[kMostProjections];
  Groups groups;
  int* slots;  // [N], of the outer form
};

// A block of D × E, and a group of contexts.
struct Block {
  int d_begin, d_size, e_begin, e_size, u_begin, u_size;
};

template <class C>
__device__ __forceinline__ float read(const Parameter& p, int64_t at) {
  if (p.wide) return static_cast<const float*>(p.data)[at];
  return to_float(static_cast<const C*>(p.data)[at]);
}

template <class C>
__device__ __forceinline__ void write(const Parameter& p, int64_t at, float value) {
  if (p.wide) {
    static_cast<float*>(p.data)[at] = value;
  } else {
    static_cast<C*>(p.data)[at] = from_float<C>(value);
  }
}

// Two of a parameter, `stride` apart, of which `left` are there; zeros else, and where there is no parameter.
template <class C>
__device__ __forceinline__ void read_two(float (&two)[2], const Parameter& p, int64_t at, int64_t stride, int left) {
  two[0] = p.data && left > 0 ? read<C>(p, at) : 0.0f;
  two[1] = p.data && left > 1 ? read<C>(p, at + stride) : 0.0f;
}

// Two neighbours, of which `left` have a place.
template <class C>
__device__ __forceinline__ void write_two(C* to, float a, float b, int left) {
  if (left > 1 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(C)) == 0) return store_two(to, a, b);
  if (left > 0) to[0] = from_float<C>(a);
  if (left > 1) to[1] = from_float<C>(b);
}

// Two of a parameter, `stride` apart.
template <class C>
__device__ __forceinline__ void write_two(const Parameter& p, int64_t at, int64_t stride, float a, float b, int left) {
  if (stride == 1) {
    if (p.wide) return write_two(static_cast<float*>(p.data) + at, a, b, left);
    return write_two(static_cast<C*>(p.data) + at, a, b, left);
  }
  if (left > 0) write<C>(p, at, a);
  if (left > 1) write<C>(p, at + stride, b);
}

}  // namespace ctxkern
