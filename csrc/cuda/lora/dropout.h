// Dropout by a mask that is made where it is used, from a seed, a row of x and a column (reference.py: lora_dropout_mask).
#pragma once

#include "call.h"

namespace ctxkern {

// A bijection of 64 bits: the finaliser of splitmix64.
__device__ __forceinline__ uint64_t mixed_bits(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// What is kept of one row.
struct RowDraws {
  uint32_t first, second, from;

  __device__ __forceinline__ bool kept(int column) const {
    uint32_t h = static_cast<uint32_t>(column) * 0x9e3779b1u + first;
    h = (h ^ h >> 16) * 0x85ebca6bu ^ second;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return (h ^ h >> 16) >= from;
  }
};

struct Dropout {
  uint32_t kept_from;  // 0: none
  uint64_t seed;       // its bits mixed

  __device__ __forceinline__ RowDraws of(int64_t row) const {
    if (!kept_from) return {0, 0, 0};
    const uint64_t key = mixed_bits(static_cast<uint64_t>(row) + seed);
    return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), kept_from};
  }
};

__device__ __forceinline__ Dropout dropout_of(const LoraCall& q) {
  if (!q.kept_from) return {0, 0};
  return {static_cast<uint32_t>(q.kept_from), mixed_bits(static_cast<uint64_t>(*q.seed))};
}

}  // namespace ctxkern
