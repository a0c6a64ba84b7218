// A tile of a product: sums [BM, BN] = Σ_k a[m, k] b[k, n] by the threads of a block, operands staged through shared
// memory by copies that run ahead.
//
// An operand is a class with
//   kAlongSum                 whether neighbours in memory are neighbours along the sum (else along m or n)
//   chunk(to, plane, at, k)   kChunk<C> neighbours from m or n = at and k on, zeros beyond its bounds; what rounding
//                             leaves goes `plane` elements further, kPlanes - 1 times
// and where kPlain is true
//   plain()                   whether chunks can be copied as they lie, for whole stages
//   from(line, part)          from where: line is m or n along the sum, else k. Beyond its bounds of m or n the last
//                             that is there, as nothing reads those sums
//   step()                    how far on the next stage's is
// and where kOrders is true, which is never along the sum
//   ordered()                 whether lines lie in an order of their own, so that there is no such step
// C: float (multiplied and added in float32, or rounded to TF32 for the matrix unit) or a half (the matrix unit); sums
// are float32. planes: into how many values of C one of b is split: 2 of float are rounded to TF32 in registers.
#pragma once

#include "device.h"

namespace ctxkern {

template <class C>
constexpr int kChunk = 16 / static_cast<int>(sizeof(C));
// Along the sum, a stage.
template <class C>
constexpr int kDepth = sizeof(C) == 2 ? 32 : 16;
constexpr int kStages = 3;
// Values of C that a stage holds for each of an operand that is split into `planes`.
template <class C, int planes>
constexpr int kStored = sizeof(C) == 4 ? 1 : planes;

// Rows and columns of a tile, and of the warps that share it.
template <int M, int N, int WarpsM, int WarpsN>
struct Tile {
  static constexpr int kM = M, kN = N, kWarpsM = WarpsM, kWarpsN = WarpsN;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  // In tiles of 16 × 8, of a warp.
  static constexpr int kRows = M / WarpsM / 16, kColumns = N / WarpsN / 8;
};

// Blocks that a multiprocessor holds at once, by registers: as many as spill nothing.
template <class C, class T>
constexpr int resident() {
  if (T::kThreads > 128) return 2;
  return sizeof(C) == 4 ? 3 : T::kRows * T::kColumns > 8 ? 4 : 5;
}

template <class T>
struct Sums {
  float at[T::kRows][T::kColumns][4];

  __device__ __forceinline__ void clear() {
    CTXKERN_UNROLL for (int i = 0; i < T::kRows; ++i)
      CTXKERN_UNROLL for (int j = 0; j < T::kColumns; ++j)
        CTXKERN_UNROLL for (int k = 0; k < 4; ++k) at[i][j][k] = 0;
  }

  __device__ __forceinline__ void add(const Sums& other) {
    CTXKERN_UNROLL for (int i = 0; i < T::kRows; ++i)
      CTXKERN_UNROLL for (int j = 0; j < T::kColumns; ++j)
        CTXKERN_UNROLL for (int k = 0; k < 4; ++k) at[i][j][k] += other.at[i][j][k];
  }

  // f(row, column, sum) for each that this thread has.
  template <class F>
  __device__ __forceinline__ void each(F f) {
    rows([](int row) { return row; },
         [&](int row, int, int column, float& a, float& b) {
           f(row, column, a);
           f(row, column + 1, b);
         });
  }

  // f(line, j, column, sum, sum of the next column), of an even column, the thread's j-th; line: prepare(row), once.
  template <class P, class F>
  __device__ __forceinline__ void rows(P prepare, F f) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp / T::kWarpsN * (T::kM / T::kWarpsM) + lane / 4;
    CTXKERN_UNROLL for (int i = 0; i < T::kRows; ++i)
      CTXKERN_UNROLL for (int h = 0; h < 2; ++h) {
        const auto line = prepare(row + 16 * i + 8 * h);
        columns([&](int j, int column) { f(line, j, column, at[i][j][2 * h], at[i][j][2 * h + 1]); });
      }
  }

  // f(j, column) for the even columns that this thread has.
  template <class F>
  static __device__ __forceinline__ void columns(F f) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = warp % T::kWarpsN * (T::kN / T::kWarpsN) + lane % 4 * 2;
    CTXKERN_UNROLL for (int j = 0; j < T::kColumns; ++j) f(j, column + 8 * j);
  }
};

// One operand's part of a stage: lines of chunks, longer than they are so that what a warp reads at once, the rows of a
// matrix of eight or 4 lines of 8 floats, lies in different banks.
template <class C, bool along_sum, int size>
struct Stage {
  static constexpr int kLine = (along_sum ? kDepth<C> : size) + (sizeof(C) == 4 && !along_sum ? 8 : kChunk<C>);
  static constexpr int kLines = along_sum ? size : kDepth<C>;
  static constexpr int kElements = kLine * kLines;

  static __device__ __forceinline__ int at(int outer, int k) { return along_sum ? outer * kLine + k : k * kLine + outer; }

  template <class Operand>
  static __device__ __forceinline__ void fill(C* stage, const Operand& operand, int k, int threads) {
    constexpr int chunks = (along_sum ? kDepth<C> : size) / kChunk<C>;
    for (int i = threadIdx.x; i < chunks * kLines; i += threads) {
      const int line = i / chunks, part = i % chunks * kChunk<C>;
      C* to = stage + line * kLine + part;
      operand.chunk(to, kElements, along_sum ? line : part, k + (along_sum ? part : line));
    }
  }
};

// How stages are filled: any operands chunk by chunk; plain ones by addresses that move on, or found by their order.
enum class Way { kChunks, kPlain, kOrdered };

// An operand on its way into stages.
template <class C, class StageOf, class Operand, int size, int threads>
struct Feed {
  static constexpr int kChunks = (Operand::kAlongSum ? kDepth<C> : size) / kChunk<C>;
  static constexpr int kRounds = kChunks * StageOf::kLines / threads;
  static constexpr bool kPossible = Operand::kPlain && kRounds * threads == kChunks * StageOf::kLines;
  static constexpr bool kOrders = kPossible && Operand::kOrders;

  const Operand& operand;
  bool plain = false, ordered = false;
  const C* from[kRounds > 0 ? kRounds : 1] = {};
  int step = 0;

  __device__ __forceinline__ explicit Feed(const Operand& of) : operand(of) {
    if constexpr (kPossible) {
      plain = operand.plain() && operand.step() <= INT32_MAX;
      if constexpr (kOrders) ordered = operand.ordered();
      if (!plain || ordered) return;
      step = static_cast<int>(operand.step());
      CTXKERN_UNROLL for (int r = 0; r < kRounds; ++r) {
        const int i = threadIdx.x + r * threads;
        from[r] = operand.from(i / kChunks, i % kChunks * kChunk<C>);
      }
    }
  }

  template <Way way>
  __device__ __forceinline__ void fill(C* stage, int k) {
    if constexpr (way != Way::kChunks && kPossible) {
      CTXKERN_UNROLL for (int r = 0; r < kRounds; ++r) {
        const int i = threadIdx.x + r * threads, line = i / kChunks, part = i % kChunks * kChunk<C>;
        C* to = stage + line * StageOf::kLine + part;
        if constexpr (way == Way::kOrdered && kOrders) {
          copy_async(to, operand.from(k + line, part));
        } else {
          copy_async(to, from[r]);
          from[r] += step;
        }
      }
    } else {
      StageOf::fill(stage, operand, k, threads);
    }
  }
};

template <class C>
__device__ __forceinline__ bool in_chunks(const C* from, int64_t stride) {
  return reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride % kChunk<C> == 0;
}

// apart: the residual of b is summed by itself, as matrix units drop bits of a term that is small next to the sum.
template <class C, class T, int planes, class A, class B, bool apart = false>
struct Product {
  using StageA = Stage<C, A::kAlongSum, T::kM>;
  using StageB = Stage<C, B::kAlongSum, T::kN>;
  static constexpr int kPlanes = kStored<C, planes>;
  static constexpr int kElements = StageA::kElements + kPlanes * StageB::kElements;
  static constexpr size_t kShared = kStages * kElements * sizeof(C);

  // Adds the product over k from 0 to depth; all threads of the block together.
  static __device__ __forceinline__ void add(Sums<T>& sums, const A& a, const B& b, int depth, bool tf32 = false) {
    Feed<C, StageA, A, T::kM, T::kThreads> left(a);
    Feed<C, StageB, B, T::kN, T::kThreads> right(b);
    Sums<T> rest;
    if constexpr (apart) rest.clear();
    int begin = 0;
    if constexpr (decltype(left)::kPossible && decltype(right)::kPossible) {
      if (left.plain && right.plain) begin = depth / kDepth<C> * kDepth<C>;
      if constexpr (decltype(left)::kOrders || decltype(right)::kOrders) {
        if (begin && (left.ordered || right.ordered)) {
          run<Way::kOrdered>(sums, rest, left, right, 0, begin, tf32);
        } else if (begin) {
          run<Way::kPlain>(sums, rest, left, right, 0, begin, tf32);
        }
      } else {
        if (begin) run<Way::kPlain>(sums, rest, left, right, 0, begin, tf32);
      }
    }
    if (begin < depth) run<Way::kChunks>(sums, rest, left, right, begin, depth, tf32);
    if constexpr (apart) sums.add(rest);
  }

 private:
  template <Way way, class Left, class Right>
  static __device__ __forceinline__ void run(Sums<T>& sums, [[maybe_unused]] Sums<T>& rest, Left& left, Right& right,
                                             int begin, int end, bool tf32) {
    C* shared = reinterpret_cast<C*>(shared_memory());
    const int steps = (end - begin + kDepth<C> - 1) / kDepth<C>;
    auto fill = [&](int step) {
      if (step < steps) {
        C* stage = shared + step % kStages * kElements;
        left.template fill<way>(stage, begin + step * kDepth<C>);
        right.template fill<way>(stage + StageA::kElements, begin + step * kDepth<C>);
      }
      commit_copies();
    };
    for (int step = 0; step < kStages - 1; ++step) fill(step);
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();
      fill(step + kStages - 1);
      const C* stage = shared + step % kStages * kElements;
      CTXKERN_UNROLL for (int plane = 0; plane < kPlanes; ++plane)
        multiply_stage(apart && plane ? rest : sums, apart ? rest : sums, stage,
                       stage + StageA::kElements + plane * StageB::kElements, tf32);
    }
    wait_copies<0>();
    __syncthreads();
  }

  static __device__ __forceinline__ void multiply_stage(Sums<T>& sums, [[maybe_unused]] Sums<T>& rest, const C* a,
                                                        const C* b, [[maybe_unused]] bool tf32) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int m = warp / T::kWarpsN * (T::kM / T::kWarpsM), n = warp % T::kWarpsN * (T::kN / T::kWarpsN);
    if constexpr (sizeof(C) == 4) {
      if (planes > 1 || tf32) return multiply_stage_tf32(sums, rest, a, b, m, n);
      // a stage by itself first: rounding grows with the number of terms of a sum
      Sums<T> stage;
      stage.clear();
      for (int k = 0; k < kDepth<C>; ++k) {
        float left[T::kRows][2], right[T::kColumns][2];
        CTXKERN_UNROLL for (int i = 0; i < T::kRows; ++i)
          CTXKERN_UNROLL for (int h = 0; h < 2; ++h) left[i][h] = a[StageA::at(m + 16 * i + 8 * h + lane / 4, k)];
        CTXKERN_UNROLL for (int j = 0; j < T::kColumns; ++j)
          CTXKERN_UNROLL for (int h = 0; h < 2; ++h) right[j][h] = b[StageB::at(n + 8 * j + lane % 4 * 2 + h, k)];
        CTXKERN_UNROLL for (int i = 0; i < T::kRows; ++i)
          CTXKERN_UNROLL for (int j = 0; j < T::kColumns; ++j)
            CTXKERN_UNROLL for (int h = 0; h < 4; ++h) stage.at[i][j][h] += left[i][h / 2] * right[j][h % 2];
      }
      sums.add(stage);
    } else {
      static_assert(T::kColumns % 2 == 0, "columns come in pairs of tiles");
      const int low = lane % 8, j8 = lane / 8;
      CTXKERN_UNROLL for (int k = 0; k < kDepth<C>; k += 16) {
        uint32_t left[T::kRows][4], right[T::kColumns / 2][4];
        CTXKERN_UNROLL for (int i = 0; i < T::kRows; ++i) {
          const int row = m + 16 * i + j8 % 2 * 8, at = k + j8 / 2 * 8;
          const C* from = a + (A::kAlongSum ? StageA::at(row + low, at) : StageA::at(row, at + low));
          load_matrices<!A::kAlongSum>(left[i], from);
        }
        CTXKERN_UNROLL for (int j = 0; j < T::kColumns / 2; ++j) {
          const int column = n + 16 * j + j8 / 2 * 8, at = k + j8 % 2 * 8;
          const C* from = b + (B::kAlongSum ? StageB::at(column + low, at) : StageB::at(column, at + low));
          load_matrices<!B::kAlongSum>(right[j], from);
        }
        CTXKERN_UNROLL for (int i = 0; i < T::kRows; ++i)
          CTXKERN_UNROLL for (int j = 0; j < T::kColumns; ++j)
            multiply<C>(sums.at[i][j], left[i], right[j / 2] + j % 2 * 2);
      }
    }
  }

  static __device__ __forceinline__ void multiply_stage_tf32(Sums<T>& sums, [[maybe_unused]] Sums<T>& rest, const C* a,
                                                             const C* b, int m, int n) {
    const int group = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    CTXKERN_UNROLL for (int k = 0; k < kDepth<C>; k += 8) {
      float left[T::kRows][4], right[T::kColumns][2];
      CTXKERN_UNROLL for (int i = 0; i < T::kRows; ++i)
        CTXKERN_UNROLL for (int h = 0; h < 4; ++h)
          left[i][h] = a[StageA::at(m + 16 * i + h % 2 * 8 + group, k + t + h / 2 * 4)];
      CTXKERN_UNROLL for (int j = 0; j < T::kColumns; ++j)
        CTXKERN_UNROLL for (int h = 0; h < 2; ++h) right[j][h] = b[StageB::at(n + 8 * j + group, k + t + h * 4)];
      CTXKERN_UNROLL for (int i = 0; i < T::kRows; ++i)
        CTXKERN_UNROLL for (int j = 0; j < T::kColumns; ++j) multiply_tf32(sums.at[i][j], left[i], right[j]);
      if constexpr (planes > 1) {
        CTXKERN_UNROLL for (int j = 0; j < T::kColumns; ++j)
          CTXKERN_UNROLL for (int h = 0; h < 2; ++h) right[j][h] -= to_tf32(right[j][h]);
        CTXKERN_UNROLL for (int i = 0; i < T::kRows; ++i)
          CTXKERN_UNROLL for (int j = 0; j < T::kColumns; ++j) multiply_tf32(rest.at[i][j], left[i], right[j]);
      }
    }
  }
};

// kChunk<C> elements from `from` on, `stride` apart, of which `valid` are there.
template <class C, class S>
__device__ __forceinline__ void read_chunk(float (&values)[kChunk<C>], const S* from, int64_t stride, int valid) {
  constexpr int each = kChunk<S>;
  if constexpr (each > kChunk<C>) {
    if (stride == 1 && valid >= kChunk<C> && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
      S part[kChunk<C>];
      load_half_vector(part, from);
      CTXKERN_UNROLL for (int i = 0; i < kChunk<C>; ++i) values[i] = to_float(part[i]);
      return;
    }
  } else {
    if (stride == 1 && valid >= kChunk<C> && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      CTXKERN_UNROLL for (int at = 0; at < kChunk<C>; at += each) {
        S part[each];
        load_vector(part, from + at);
        CTXKERN_UNROLL for (int i = 0; i < each; ++i) values[at + i] = to_float(part[i]);
      }
      return;
    }
  }
  CTXKERN_UNROLL for (int i = 0; i < kChunk<C>; ++i) values[i] = i < valid ? to_float(from[i * stride]) : 0.0f;
}

// Into a stage, and planes - 1 times the residual.
template <int planes, class C>
__device__ __forceinline__ void write_chunk(C* to, int plane, float (&values)[kChunk<C>]) {
  CTXKERN_UNROLL for (int p = 0; p < planes; ++p) {
    C rounded[kChunk<C>];
    CTXKERN_UNROLL for (int i = 0; i < kChunk<C>; ++i) {
      rounded[i] = from_float<C>(values[i]);
      values[i] -= to_float(rounded[i]);
    }
    store_vector(to + p * plane, rounded);
  }
}

// The same as a copy that runs ahead, where the elements are those of a stage and in place.
template <int planes, class C, class S>
__device__ __forceinline__ void load_chunk(C* to, int plane, const S* from, int64_t stride, int valid) {
  float values[kChunk<C>] = {};
  if constexpr (sizeof(S) == sizeof(C)) {
    if (stride == 1 && valid >= kChunk<C> && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      copy_async(to, from);
      if constexpr (planes > 1) write_chunk<planes - 1>(to + plane, plane, values);
      return;
    }
  }
  read_chunk<C>(values, from, stride, valid);
  write_chunk<planes>(to, plane, values);
}

}  // namespace ctxkern
