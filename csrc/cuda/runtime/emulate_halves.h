// Half-precision numbers on the CPU, as the device has them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ctxkern::emulated {

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ffu;
  float value;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(fraction), -24);
  } else if (exponent == 31) {
    value = fraction ? NAN : INFINITY;
  } else {
    value = std::ldexp(static_cast<float>(fraction | 0x400u), static_cast<int>(exponent) - 25);
  }
  return sign ? -value : value;
}

// To the nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);
  const int scale = std::max(exponent - 11, -24);
  const float rounded = std::nearbyint(std::ldexp(size, -scale));
  // a subnormal's fraction, or exponent and fraction together, which carry into each other
  const int bits = static_cast<int>(rounded) + (scale + 24) * 0x400;
  return sign | static_cast<uint16_t>(size == 0 ? 0 : bits);
}

}  // namespace ctxkern::emulated

namespace ctxkern {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return emulated::half_to_float(x.bits); }
inline float to_float(Bfloat x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Half from_float<Half>(float x) {
  return {emulated::float_to_half(x)};
}
template <>
inline Bfloat from_float<Bfloat>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

}  // namespace ctxkern
