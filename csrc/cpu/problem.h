// What the kernels are given. Sizes and strides count elements unless they say bytes; symbols as in DESIGN.md: N rows of x,
// D = d_in, E = d_out, K = context_dim, U distinct contexts.
#pragma once

#include <cstdint>

#include "rows.h"

namespace ctxkern {

enum class Dtype : int { f32, bf16, f16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

struct Matrix {
  char* data;  // null: absent
  Dtype dtype;
  int64_t rows, columns;  // strides
};

struct Bilinear {
  char* data;
  Dtype dtype;
  int64_t d, e, k;  // strides
};

struct Projection {
  int64_t d_out;
  Matrix weight;      // [D, E]
  Bilinear bilinear;  // [D, E, K]
  const char* bias;   // [E] or null
  Dtype bias_dtype;
  char* y;          // [N, E] dense, dtype of x: what the forward writes
  const char* dy;   // likewise: what the backward reads
  Matrix dweight;   // null where not asked for
  Bilinear dbilinear;
};

constexpr int kMaxProjections = 3;

struct Problem {
  int64_t tokens, d_in, context_dim, table;  // N, D, K, rows of the context table
  Dtype dtype;
  const char* x;        // [N, D] dense
  Matrix context;       // [table, K], columns 1 apart
  const Rows* rows;
  int projections;
  Projection projection[kMaxProjections];
  char* dx;        // [N, D] dense, dtype of x; null where not asked for
  char* dcontext;  // [table, K] dense, dtype of context; likewise
  bool outer;
  int threads;
  int64_t budget;  // bytes for weights and their gradients
};

// Tiles that a call would use, and the memory that it needs beside its operands.
struct Tiles {
  int64_t strip, across, group;  // columns of E or rows of D, the other side, contexts at a time
  int64_t threads, ranges;       // ranges: parts of D whose sums for dcontext are kept apart
  int64_t weights_bytes;         // of `bytes`, those for weights and gradients of weights
  int64_t bytes;
};

// The entry points of one instruction set.
struct Kernels {
  Tiles (*tiles)(const Problem&, bool backward);
  void (*forward)(const Problem&, const Tiles&, char* workspace);
  void (*backward)(const Problem&, const Tiles&, char* workspace);
};

}  // namespace ctxkern
