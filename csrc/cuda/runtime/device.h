// What the kernels ask of the machine: halves, asynchronous copies, and what a warp does together. Under
// CTXKERN_EMULATE the same names run on the CPU (emulate.h).
#pragma once

#include <cstdint>

#ifdef CTXKERN_EMULATE
#include "emulate.h"
#define CTXKERN_UNROLL
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define CTXKERN_UNROLL _Pragma("unroll")

namespace ctxkern {

using Half = __half;
using Bfloat = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(Bfloat x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ Bfloat from_float<Bfloat>(float x) {
  return __float2bfloat16_rn(x);
}

// 16 bytes from or to an address that is a multiple of that.
template <class T>
__device__ __forceinline__ void load_vector(T* to, const T* from) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  memcpy(to, &words, 16);
}
// Half as many, likewise.
template <class T>
__device__ __forceinline__ void load_half_vector(T* to, const T* from) {
  const uint2 words = *reinterpret_cast<const uint2*>(from);
  memcpy(to, &words, 8);
}
template <class T>
__device__ __forceinline__ void store_vector(T* to, const T* from) {
  uint4 words;
  memcpy(&words, from, 16);
  *reinterpret_cast<uint4*>(to) = words;
}

// Two neighbours, to or from a multiple of their size.
__device__ __forceinline__ void store_two(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}
__device__ __forceinline__ void store_two(Half* to, float a, float b) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b);
}
__device__ __forceinline__ void store_two(Bfloat* to, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b);
}

__device__ __forceinline__ void load_two(float (&to)[2], const float* from) {
  const float2 two = *reinterpret_cast<const float2*>(from);
  to[0] = two.x, to[1] = two.y;
}
__device__ __forceinline__ void load_two(float (&to)[2], const Half* from) {
  const float2 two = __half22float2(*reinterpret_cast<const __half2*>(from));
  to[0] = two.x, to[1] = two.y;
}
__device__ __forceinline__ void load_two(float (&to)[2], const Bfloat* from) {
  const float2 two = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
  to[0] = two.x, to[1] = two.y;
}

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char ctxkern_shared[];
  return ctxkern_shared;
}

__device__ __forceinline__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// 16 bytes, into shared memory.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last `kept` groups of this thread's copies have landed.
template <int kept>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kept) : "memory");
}

// Four 8 × 8 matrices of halves out of shared memory; `row` points to row lane % 8 of matrix lane / 8.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// sums [16, 8] += a [16, 16] · b [16, 8], spread over the lanes as mma.m16n8k16 has them.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b);
template <>
__device__ __forceinline__ void multiply<Half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply<Bfloat>(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// To 10 bits of fraction.
__device__ __forceinline__ float to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// sums [16, 8] += a [16, 8] · b [8, 8] of floats rounded to TF32, as mma.m16n8k8 has them.
__device__ __forceinline__ void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  uint32_t left[4], right[2];
  CTXKERN_UNROLL for (int i = 0; i < 4; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(left[i]) : "f"(a[i]));
  CTXKERN_UNROLL for (int i = 0; i < 2; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(right[i]) : "f"(b[i]));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// The value of the lane whose number differs in the bits of `mask`.
__device__ __forceinline__ float exchange(float value, unsigned mask) {
  return __shfl_xor_sync(0xffffffffu, value, static_cast<int>(mask));
}

}  // namespace ctxkern
#endif
