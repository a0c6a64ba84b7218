// CUDA on the CPU, for tests: the threads of a block are fibers that run one at a time and change places at barriers and
// at what a warp does together. Blocks run one after another.
//
// What it is strict about: threads run in a new random order after every barrier, shared memory begins as NaNs and ends
// where it was asked to end (an address sanitizer sees what lies beyond), asynchronous copies land only when they are
// waited for, all lanes of a warp must take part in what it does together, and a barrier that some threads never reach
// is an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulate_halves.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace ctxkern::emulated {

struct Copy {
  void* to;
  const void* from;
};

enum class State { kReady, kBarrier, kWarp, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  dim3 index;
  // Copies not yet committed, and the groups that were.
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

// What the lanes of a warp do together: lane l's operands lie at arguments[l].
using Together = void (*)(void* const* arguments);

struct Warp {
  void* arguments[32];
  Together what;
  int arrived;
};

constexpr size_t kStack = 256 << 10;

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
  std::function<void()> program;
  ucontext_t scheduler;
  Thread* current = nullptr;
  std::string failed;
  std::mt19937 chance{1};
};

inline Machine machine;

inline unsigned seed() {
  const char* given = std::getenv("CTXKERN_EMULATE_SEED");
  return given ? static_cast<unsigned>(std::atoi(given)) : 1;
}

inline void yield(State state) {
  Thread* mine = machine.current;
  mine->state = state;
  swapcontext(&mine->context, &machine.scheduler);
}

inline void together(Together what, void* mine) {
  const unsigned lane = machine.current->index.x % 32;
  Warp& warp = machine.warps[machine.current->index.x / 32];
  if (warp.arrived && warp.what != what) machine.failed = "lanes of a warp do different things together";
  warp.what = what;
  warp.arguments[lane] = mine;
  ++warp.arrived;
  yield(State::kWarp);
}

inline void body() {
  try {
    machine.program();
    for (const auto& group : machine.current->groups)
      if (!group.empty()) throw std::runtime_error("a thread ends before its copies");
    if (!machine.current->open.empty()) throw std::runtime_error("a thread ends before its copies were committed");
  } catch (const std::exception& error) {
    machine.failed = error.what();
  }
  yield(State::kDone);
}

inline void resume(Thread& thread) {
  machine.current = &thread;
  threadIdx = thread.index;
  swapcontext(&machine.scheduler, &thread.context);
}

inline void run_block(unsigned count) {
  auto& threads = machine.threads;
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.state = State::kReady;
    thread.index = {i, 0, 0};
    thread.open.clear();
    thread.groups.clear();
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, body, 0);
  }
  for (Warp& warp : machine.warps) warp.arrived = 0;
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), machine.chance);
  for (unsigned done = 0; done < count;) {
    bool any = false;
    for (unsigned i : order) {
      if (threads[i].state != State::kReady) continue;
      any = true;
      resume(threads[i]);
      if (threads[i].state == State::kDone) ++done;
      Warp& warp = machine.warps[i / 32];
      if (warp.arrived == 32) {
        warp.what(warp.arguments);
        warp.arrived = 0;
        for (unsigned lane = 0; lane < 32; ++lane) threads[i / 32 * 32 + lane].state = State::kReady;
      }
      if (!machine.failed.empty()) throw std::runtime_error(machine.failed);
    }
    if (any) continue;
    unsigned at_barrier = 0;
    for (unsigned i = 0; i < count; ++i) at_barrier += threads[i].state == State::kBarrier;
    if (at_barrier + done < count) throw std::runtime_error("lanes of a warp wait for others that do not come");
    for (unsigned i = 0; i < count; ++i)
      if (threads[i].state == State::kBarrier) threads[i].state = State::kReady;
    std::shuffle(order.begin(), order.end(), machine.chance);
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, unsigned threads, size_t shared, const Args&... args) {
  machine.failed.clear();
  machine.chance.seed(seed());
  machine.program = [&] { kernel(args...); };
  if (machine.threads.size() < threads) machine.threads.resize(threads);
  machine.warps.resize((threads + 31) / 32);
  if (threads % 32) throw std::runtime_error("a block is not made of whole warps");
  gridDim = grid;
  blockDim = {threads, 1, 1};
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        machine.shared.reset(new char[shared]);
        std::memset(machine.shared.get(), 0xff, shared);
        run_block(threads);
      }
  machine.shared.reset();
}

// Throws where an address is not a multiple of `size`, as the machine would.
inline void aligned(const void* at, size_t size) {
  if (reinterpret_cast<uintptr_t>(at) % size) throw std::runtime_error("a misaligned address");
}

}  // namespace ctxkern::emulated

inline void __syncthreads() { ctxkern::emulated::yield(ctxkern::emulated::State::kBarrier); }

namespace ctxkern {

inline char* shared_memory() { return emulated::machine.shared.get(); }

template <class T>
void load_vector(T* to, const T* from) {
  emulated::aligned(from, 16);
  std::memcpy(to, from, 16);
}
template <class T>
void load_half_vector(T* to, const T* from) {
  emulated::aligned(from, 8);
  std::memcpy(to, from, 8);
}
template <class T>
void store_vector(T* to, const T* from) {
  emulated::aligned(to, 16);
  std::memcpy(to, from, 16);
}
template <class T>
void store_two(T* to, float a, float b) {
  emulated::aligned(to, 2 * sizeof(T));
  to[0] = from_float<T>(a);
  to[1] = from_float<T>(b);
}

template <class T>
void load_two(float (&to)[2], const T* from) {
  emulated::aligned(from, 2 * sizeof(T));
  to[0] = to_float(from[0]);
  to[1] = to_float(from[1]);
}

inline void copy_async(void* to, const void* from) {
  emulated::aligned(to, 16);
  emulated::aligned(from, 16);
  emulated::machine.current->open.push_back({to, from});
}
inline void commit_copies() {
  auto* thread = emulated::machine.current;
  thread->groups.push_back(std::move(thread->open));
  thread->open.clear();
}
// Until all but the last `kept` groups of this thread's copies have landed.
template <int kept>
inline void wait_copies() {
  auto& groups = emulated::machine.current->groups;
  const size_t landed = groups.size() > kept ? groups.size() - kept : 0;
  for (size_t i = 0; i < landed; ++i)
    for (const auto& copy : groups[i]) std::memcpy(copy.to, copy.from, 16);
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(landed));
}

namespace emulated {

struct MatrixLoad {
  const uint16_t* row;
  uint32_t* registers;
};

// Matrix j has its rows at what lanes 8j to 8j + 7 point to; a lane receives two neighbours of row lane / 4, transposed
// two of a column.
template <bool transposed>
void load_matrices(void* const* arguments) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<MatrixLoad*>(arguments[lane]);
    for (int j = 0; j < 4; ++j) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
        pair[i] = static_cast<MatrixLoad*>(arguments[8 * j + row])->row[column];
      }
      std::memcpy(&mine->registers[j], pair, 4);
    }
  }
}

struct Product {
  float* sums;
  const uint32_t *a, *b;
};

template <class T>
float element(const uint32_t* registers, int word, int half) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(registers + word) + 2 * half, 2);
  return to_float(value);
}

// sums [16, 8] += a [16, 16] · b [16, 8], each spread over the lanes as mma.m16n8k16 has them.
template <class T>
void multiply(void* const* arguments) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<Product*>(arguments[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int word = 0; word < 4; ++word)
        a[group + word % 2 * 8][pair + i + word / 2 * 8] = element<T>(mine->a, word, i);
      for (int word = 0; word < 2; ++word) b[pair + i + word * 8][group] = element<T>(mine->b, word, i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<Product*>(arguments[lane]);
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) mine->sums[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
  }
}

struct ProductTf32 {
  float* sums;
  const float *a, *b;
};

// To 10 bits of fraction, halves away from zero.
inline float to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x1000u) & 0xffffe000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void multiply_tf32(void* const* arguments) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<ProductTf32*>(arguments[lane]);
    for (int i = 0; i < 4; ++i) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = to_tf32(mine->a[i]);
    for (int i = 0; i < 2; ++i) b[lane % 4 + i * 4][lane / 4] = to_tf32(mine->b[i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<ProductTf32*>(arguments[lane]);
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 8; ++k) mine->sums[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
  }
}

struct Exchange {
  float value;
  unsigned mask;
  float result;
};

inline void exchange(void* const* arguments) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<Exchange*>(arguments[lane]);
    mine->result = static_cast<Exchange*>(arguments[lane ^ mine->mask])->value;
  }
}

}  // namespace emulated

// Four 8 × 8 matrices of halves out of shared memory; `row` points to row lane % 8 of matrix lane / 8.
template <bool transposed>
void load_matrices(uint32_t (&registers)[4], const void* row) {
  emulated::MatrixLoad mine{static_cast<const uint16_t*>(row), registers};
  emulated::together(emulated::load_matrices<transposed>, &mine);
}

template <class T>
void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emulated::Product mine{sums, a, b};
  emulated::together(emulated::multiply<T>, &mine);
}

inline float to_tf32(float x) { return emulated::to_tf32(x); }

inline void multiply_tf32(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
  emulated::ProductTf32 mine{sums, a, b};
  emulated::together(emulated::multiply_tf32, &mine);
}

// The value of the lane whose number differs in the bits of `mask`.
inline float exchange(float value, unsigned mask) {
  emulated::Exchange mine{value, mask, 0};
  emulated::together(emulated::exchange, &mine);
  return mine.result;
}

}  // namespace ctxkern
