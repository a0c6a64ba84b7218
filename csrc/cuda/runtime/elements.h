// Elements of operands, which are of the dtype of x, or float32 next to a half, or a half next to float32.
#pragma once

#include "../../problem.h"
#include "device.h"

namespace ctxkern {

template <class H>
constexpr Dtype kCode = Dtype::f32;
template <>
constexpr Dtype kCode<Bfloat> = Dtype::bf16;
template <>
constexpr Dtype kCode<Half> = Dtype::f16;

template <class H>
__device__ __forceinline__ H* elements(const Operand& p) {
  return reinterpret_cast<H*>(p.data);
}

// f(pointer to the elements of a parameter): H, the dtype of x, or float32 next to a half, or a half next to float32.
template <class H, class F>
__device__ __forceinline__ void with_elements(const Operand& p, F f) {
  if (p.dtype == kCode<H>) return f(elements<H>(p));
  if constexpr (sizeof(H) == 2) {
    f(elements<float>(p));
  } else if (p.dtype == Dtype::bf16) {
    f(elements<Bfloat>(p));
  } else {
    f(elements<Half>(p));
  }
}

template <class H>
__device__ __forceinline__ float read(const Operand& p, int64_t at) {
  float value = 0;
  with_elements<H>(p, [&](auto* data) { value = to_float(data[at]); });
  return value;
}

template <class T>
__device__ __forceinline__ void put(T* to, float value) {
  *to = from_float<T>(value);
}

template <class H>
__device__ __forceinline__ void write(const Operand& p, int64_t at, float value) {
  with_elements<H>(p, [&](auto* data) { put(data + at, value); });
}

// Two of a parameter, `stride` apart, of which `left` are there; zeros else, and where there is no parameter.
template <class H>
__device__ __forceinline__ void read_two(float (&two)[2], const Operand& p, int64_t at, int64_t stride, int left) {
  two[0] = p.data && left > 0 ? read<H>(p, at) : 0.0f;
  two[1] = p.data && left > 1 ? read<H>(p, at + stride) : 0.0f;
}

// Two neighbours, of which `left` have a place.
template <class T>
__device__ __forceinline__ void write_two(T* to, float a, float b, int left) {
  if (left > 1 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0) return store_two(to, a, b);
  if (left > 0) put(to, a);
  if (left > 1) put(to + 1, b);
}

// a and b are added to two neighbours, of which `left` are there.
template <class T>
__device__ __forceinline__ void add_two(T* to, float a, float b, int left) {
  if (left > 1 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0) {
    float two[2];
    load_two(two, to);
    return store_two(to, two[0] + a, two[1] + b);
  }
  if (left > 0) put(to, to_float(to[0]) + a);
  if (left > 1) put(to + 1, to_float(to[1]) + b);
}

// Two of a parameter, `stride` apart.
template <class H>
__device__ __forceinline__ void write_two(const Operand& p, int64_t at, int64_t stride, float a, float b, int left) {
  with_elements<H>(p, [&](auto* data) {
    if (stride == 1) return write_two(data + at, a, b, left);
    if (left > 0) put(data + at, a);
    if (left > 1) put(data + at + stride, b);
  });
}

}  // namespace ctxkern
