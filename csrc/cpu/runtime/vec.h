// Vectors of the instruction set that this file is compiled for: float32 lanes, loads and stores by dtype.
// Everything is in an unnamed namespace, so that no set's code can stand in for another's (csrc/README.md).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../problem.h"

// Small functions on registers must not become calls: their arguments would go through memory.
#define CTXKERN_INLINE [[gnu::always_inline]] inline

namespace ctxkern {
namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float V __attribute__((vector_size(4 * VL)));
typedef int32_t VI __attribute__((vector_size(4 * VL)));
typedef uint32_t VU __attribute__((vector_size(4 * VL)));
typedef uint16_t VH __attribute__((vector_size(2 * VL)));

template <class T>
CTXKERN_INLINE T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
CTXKERN_INLINE void store(void* p, T v) {
  std::memcpy(p, &v, sizeof v);
}

// The first `bytes` bytes of a vector, zeros after them.
template <class T>
CTXKERN_INLINE T load_first(const void* p, int64_t bytes) {
  T v{};
  std::memcpy(&v, p, static_cast<size_t>(bytes));
  return v;
}

template <class T>
CTXKERN_INLINE void store_first(void* p, T v, int64_t bytes) {
  std::memcpy(p, &v, static_cast<size_t>(bytes));
}

CTXKERN_INLINE V splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return V{x, x, x, x};
#endif
}

CTXKERN_INLINE float sum(V v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < VL; ++i) total += v[i];
  return total;
#endif
}

CTXKERN_INLINE VU widen(VH h) { return __builtin_convertvector(h, VU); }

// The upper halves of float32 values rounded to nearest even, in the lower half of each lane.
CTXKERN_INLINE VU bf16_bits(V v) {
#if defined(__AVX512BF16__)
  return (VU)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const VU u = (VU)v;
  const VU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VU quiet = (u >> 16) | 0x40u;
  return (VU)((VI)(v != v) & (VI)quiet) | (VU)(~(VI)(v != v) & (VI)rounded);
#endif
}

// Words of two bfloat16, `low` in their lower halves.
CTXKERN_INLINE V pair(V low, V high) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (V)_mm512_permutexvar_epi16(load<__m512i>(kOrder), both);
#else
  return (V)(bf16_bits(low) | bf16_bits(high) << 16);
#endif
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u) {
    bits = 0x7f800000u | (rest & 0x3ffu) << 13;
  } else {
    // a float with the half's bits in place is 2^112 times too small, subnormals included
    const uint32_t raw = rest << 13;
    float scaled;
    std::memcpy(&scaled, &raw, 4);
    scaled *= 0x1p112f;
    std::memcpy(&bits, &scaled, 4);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above
  if (bits < 0x38800000u) {
    // below 2^-14: adding 0.5 leaves the subnormal's bits at the end of the sum, rounded to nearest even
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

// VL elements of a dtype as float32; `_first`: n of them, zeros after.
template <Dtype D>
CTXKERN_INLINE V load_f32(const char* p) {
  if constexpr (D == Dtype::f32) return load<V>(p);
  if constexpr (D == Dtype::bf16) return (V)(widen(load<VH>(p)) << 16);
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__AVX2__)
  return (V)_mm256_cvtph_ps(load<__m128i>(p));
#else
  V v;
  for (int i = 0; i < VL; ++i) v[i] = half_to_float(load<uint16_t>(p + 2 * i));
  return v;
#endif
}

template <Dtype D>
CTXKERN_INLINE V load_f32_first(const char* p, int64_t n) {
  if (n >= VL) return load_f32<D>(p);
  if (n <= 0) return V{};
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (D == Dtype::f32) return (V)_mm512_maskz_loadu_ps(mask, p);
  const VH h = (VH)_mm256_maskz_loadu_epi16(mask, p);
#else
  if constexpr (D == Dtype::f32) return load_first<V>(p, 4 * n);
  const VH h = load_first<VH>(p, 2 * n);
#endif
  return load_f32<D>(reinterpret_cast<const char*>(&h));
}

CTXKERN_INLINE float load_scalar(Dtype dtype, const char* p) {
  switch (dtype) {
    case Dtype::f32: return load<float>(p);
    case Dtype::f16: return half_to_float(load<uint16_t>(p));
    default: break;
  }
  const uint32_t bits = static_cast<uint32_t>(load<uint16_t>(p)) << 16;
  return load<float>(&bits);
}

// Lanes as 16-bit elements of D, bfloat16 or float16.
template <Dtype D>
CTXKERN_INLINE VH narrow(V v) {
  if constexpr (D == Dtype::bf16) {
#if defined(__AVX512BF16__)
    return (VH)_mm512_cvtneps_pbh((__m512)v);
#else
    return __builtin_convertvector(bf16_bits(v), VH);
#endif
  }
#if defined(__AVX512F__)
  return (VH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (VH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  VH h;
  for (int i = 0; i < VL; ++i) h[i] = float_to_half(v[i]);
  return h;
#endif
}

template <Dtype D>
CTXKERN_INLINE void store_as(char* p, V v) {
  if constexpr (D == Dtype::f32) {
    store(p, v);
  } else {
    store(p, narrow<D>(v));
  }
}

// Past the cache; p aligned to what is written.
template <Dtype D>
CTXKERN_INLINE void stream_as(char* p, V v) {
#if defined(__AVX512F__)
  if constexpr (D == Dtype::f32) return _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow<D>(v));
#elif defined(__AVX2__)
  if constexpr (D == Dtype::f32) return _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow<D>(v));
#else
  store_as<D>(p, v);
#endif
}

// A copy past the cache, of memory in cache that lies alike within lines of 64 bytes.
inline void stream_copy(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kLine = 64, kVector = sizeof(V);
  const int64_t unaligned = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine);
  const int64_t head = unaligned < bytes ? unaligned : bytes;
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + kLine <= bytes; at += kLine) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kLine; i += kVector) stream_as<Dtype::f32>(to + at + i, load<V>(from + at + i));
  }
  std::memcpy(to + at, from + at, static_cast<size_t>(bytes - at));
}

// After streams, before another thread reads them.
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <Dtype D>
CTXKERN_INLINE void store_as_first(char* p, V v, int64_t n) {
  if (n >= VL) return store_as<D>(p, v);
  if (n <= 0) return;
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (D == Dtype::f32) return _mm512_mask_storeu_ps(p, mask, (__m512)v);
  _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow<D>(v));
#else
  char full[sizeof(V)];
  store_as<D>(full, v);
  std::memcpy(p, full, static_cast<size_t>(n) * size_of(D));
#endif
}

CTXKERN_INLINE void store_scalar(Dtype dtype, char* p, float x) {
  switch (dtype) {
    case Dtype::f32: return store(p, x);
    case Dtype::bf16: return store(p, static_cast<uint16_t>(bf16_bits(splat(x))[0]));
    case Dtype::f16: return store(p, float_to_half(x));
  }
}

// f(Type<D>{}) with D the dtype.
template <Dtype D>
struct Type {
  static constexpr Dtype value = D;
};

template <class F>
CTXKERN_INLINE void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: return f(Type<Dtype::f32>{});
    case Dtype::bf16: return f(Type<Dtype::bf16>{});
    case Dtype::f16: return f(Type<Dtype::f16>{});
  }
}

// A VL×VL block of 32-bit words.
CTXKERN_INLINE void transpose(V (&r)[VL]) {
#if defined(__AVX512F__)
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
  }
  __m512 s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 16
    for (int j = 0; j < 2; ++j) {
      s[i + 2 * j] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + j], (__m512d)t[i + j + 2]);
      s[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + j], (__m512d)t[i + j + 2]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_shuffle_f32x4(s[j], s[j + 4], 0x88), high = _mm512_shuffle_f32x4(s[j], s[j + 4], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(s[j + 8], s[j + 12], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(s[j + 8], s[j + 12], 0xdd);
    r[j] = (V)_mm512_shuffle_f32x4(low, low2, 0x88);
    r[j + 4] = (V)_mm512_shuffle_f32x4(high, high2, 0x88);
    r[j + 8] = (V)_mm512_shuffle_f32x4(low, low2, 0xdd);
    r[j + 12] = (V)_mm512_shuffle_f32x4(high, high2, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 t[8];
#pragma GCC unroll 16
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
  __m256 s[8];
#pragma GCC unroll 16
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 16
    for (int j = 0; j < 2; ++j) {
      s[i + 2 * j] = (__m256)_mm256_unpacklo_pd((__m256d)t[i + j], (__m256d)t[i + j + 2]);
      s[i + 2 * j + 1] = (__m256)_mm256_unpackhi_pd((__m256d)t[i + j], (__m256d)t[i + j + 2]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    r[j] = (V)_mm256_permute2f128_ps(s[j], s[j + 4], 0x20);
    r[j + 4] = (V)_mm256_permute2f128_ps(s[j], s[j + 4], 0x31);
  }
#else
  const V a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const V c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

}  // namespace
}  // namespace ctxkern
