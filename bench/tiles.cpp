// What a tile of the CPU kernels (csrc/cpu/runtime/tile.h) takes beyond its products, and what rows that share a set of the
// first cache cost, for the instruction set it is compiled for:
//
//   c++ -std=c++17 -O3 -march=native -w -Icsrc bench/tiles.cpp -o tiles && ./tiles
//
// A tile's time is a line over the steps of its sum; what it takes beyond is where that line begins, in steps.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/runtime/pack.h"

using namespace ctxkern;

namespace {

#if defined(__AVX512BF16__)
using Words = Bf16;
#else
using Words = F32;
#endif

template <class F>
double least_ns(F&& f) {
  double least = 1e18;
  for (int round = 0; round < 15; ++round) {
    const auto began = std::chrono::steady_clock::now();
    for (int i = 0; i < 200; ++i) f(i);
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - began;
    if (took.count() / 200 < least) least = took.count() / 200;
  }
  return least;
}

char* zeros(size_t bytes) {
  void* const memory = std::aligned_alloc(4096, bytes);
  std::memset(memory, 0, bytes);
  return static_cast<char*>(memory);
}

// ns of a tile of the full height, of NV vectors.
template <int NV>
double tile_ns(int64_t steps, Store store, const char* left, const char* right, char* to) {
  constexpr int64_t kTiles = 8, kRows = kTiles * kTileRows<NV>;
  Out out{to, NV * VL * size_of(store), store, NV * VL};
  out.half = 2 * VL * size_of(store);
  const Left a{left, steps * 4, 4};
  const Right b{reinterpret_cast<const float*>(right), NV * VL};
  return least_ns([&](int) { product<Words, NV>(kRows, steps, a, b, out); }) / kTiles;
}

template <int NV>
void beyond(const char* name, Store store, const char* left, const char* right, char* to) {
  const double shorter = tile_ns<NV>(16, store, left, right, to), longer = tile_ns<NV>(64, store, left, right, to);
  const double step = (longer - shorter) / 48, flops = 2.0 * Words::PER * kTileRows<NV> * NV * VL;
  std::printf("%2d x %d vectors, %-10s %5.1f ns beyond its products, %4.1f steps of them; %6.1f GFLOP/s in long sums\n",
              kTileRows<NV>, NV, name, shorter - 16 * step, (shorter - 16 * step) / step, flops / step);
}

}  // namespace

int main() {
  char *const left = zeros(4 << 20), *const right = zeros(1 << 20), *const to = zeros(1 << 20);
  beyond<1>("float32", Store::f32, left, right, to);
  beyond<2>("float32", Store::f32, left, right, to);
  beyond<2>("added", Store::f32_add, left, right, to);
  beyond<2>("bfloat16", Store::bf16, left, right, to);
  beyond<4>("float32", Store::f32, left, right, to);
  beyond<4>("bfloat16", Store::bf16, left, right, to);
  for (const int64_t apart : {2048, 2048 + 64, 4096, 4096 + 64, 8192, 8192 + 64}) {
    constexpr int64_t kRows = 128, kSteps = 256;
    const Out out{to, 2 * VL * 4, Store::f32, 2 * VL};
    const double ns = least_ns([&](int i) {
      const Left a{left + i % 4 * kSteps * 4, apart, 4};
      product<Words, 2>(kRows, kSteps, a, {reinterpret_cast<const float*>(right), 2 * VL}, out);
    });
    std::printf("rows %4d bytes apart: %6.1f GFLOP/s\n", static_cast<int>(apart),
                2.0 * Words::PER * kRows * 2 * VL * kSteps / ns);
  }
}
