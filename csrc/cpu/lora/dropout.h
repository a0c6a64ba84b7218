// Dropout by a mask that is made where it is used, from a seed, a row of x and a column (reference.py: lora_dropout).
#pragma once

#include "../runtime/vec.h"

namespace ctxkern {
namespace {

// A bijection of 64 bits: the finaliser of splitmix64.
inline uint64_t mixed_bits(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// Draws of 32 bits for the columns of a row.
struct RowDraws {
  uint32_t first, second;

  RowDraws(int64_t seed, int64_t row) {
    const uint64_t key = mixed_bits(static_cast<uint64_t>(row) + mixed_bits(static_cast<uint64_t>(seed)));
    first = static_cast<uint32_t>(key);
    second = static_cast<uint32_t>(key >> 32);
  }

  // Of columns c to c + VL.
  CTXKERN_INLINE VU at(int64_t c) const {
    VU h;
    for (int i = 0; i < VL; ++i) h[i] = static_cast<uint32_t>(c + i);
    h = h * 0x9e3779b1u + first;
    h = (h ^ h >> 16) * 0x85ebca6bu ^ second;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
  }
};

// v where draws are kept, zero elsewhere.
CTXKERN_INLINE V kept(V v, VU draws, uint32_t from) { return (V)((VU)v & (VU)(draws >= from)); }

}  // namespace
}  // namespace ctxkern
