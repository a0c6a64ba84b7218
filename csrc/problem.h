// What the kernels are given, CPU and CUDA alike: plain C structs that ctxkern/runtime/problem.py mirrors by name. Both
// sides compare layouts (problem_checks.h) when a library is loaded. Sizes and strides count elements; N rows of x, D = d_in,
// E = d_out, K = context_dim.
#pragma once

#include <cstdint>

namespace ctxkern {

// The codes of ctxkern/dtypes.py.
enum class Dtype : int32_t { f32, bf16, f16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// A tensor; data is null where it is absent or has no elements.
struct Operand {
  char* data;
  Dtype dtype;
  int64_t strides[3];  // one per dimension; not read where there are no gaps
};

// Which row of a table each row of x uses.
struct Batch {
  const int32_t* bounds;  // [sequences + 1] first row of each sequence; null: `length` rows each
  const int64_t* index;   // [sequences] row of the table of each sequence; null: in the order of the table
  int64_t tokens, sequences, length, table;  // tokens: N; table: rows of the table
};

struct Projection {
  int64_t d_out;
  Operand weight;     // [D, E]
  Operand bilinear;   // [D, E, K]
  Operand bias;       // [E], without gaps
  char* rows;         // [N, E], without gaps, in the dtype of x: y, which a forward writes; dy, which a backward reads
  Operand dweight;    // absent where not asked for
  Operand dbilinear;  // likewise
};

constexpr int kMaxProjections = 3;

// A modulated call: up to three projections of one x.
struct Problem {
  Batch batch;
  Operand x;        // [N, D], without gaps
  Operand context;  // [table, K], without gaps
  char* dx;         // like x; null where not asked for
  char* dcontext;   // like context; likewise
  int64_t d_in, context_dim;
  int64_t projections;
  int64_t workspace_bytes;  // for weights and their gradients
  int64_t threads;          // CPU
  int64_t tf32;             // CUDA: whether products of float32 may be rounded to TF32
  double outer_above;       // distinct contexts above which the outer form runs
  Projection projection[kMaxProjections];
};

// A linear layer with a low-rank weight for each sequence; batch.index may hold −1: no adapter. R: the largest rank.
struct LoraProblem {
  Batch batch;
  Operand x;             // [N, D], without gaps
  Operand A;             // [table, R, D]
  Operand B;             // [table, E, R]
  const int64_t* ranks;  // [table] rank of each adapter, its first rows of A and columns of B; null: R
  const float* scales;   // [table] in addition to `scale`; null: 1
  char* rows;            // [N, E], without gaps, in the dtype of x: y in a forward, dy in a backward
  char* dx;              // like x; null where not asked for
  char* dA;              // like A, without gaps, in its dtype; likewise
  char* dB;              // like B; likewise
  int64_t d_in, d_out, rank;
  int64_t threads;
  int64_t tf32;  // CUDA: whether products of float32 may be rounded to TF32
  int64_t adds;  // whether y, or dx, holds what the update is added to; else it is written, and is zero where none is
  double scale;
  int64_t kept_from;    // dropout of what A reads: draws of 32 bits from kept_from on are kept; 0: no dropout
  const int64_t* seed;  // of dropout
  const float* gates;   // [gate_rows, R] a factor for each entry of x A^T; null: 1
  int64_t gate_rows;
  const int64_t* gate_of;  // [N] row of `gates` of each row of x; null: as many, in order
  float* products;         // [N, R] (x A^T) (dy B) scale, the gradient of each row's gates; null where not asked for
};

}  // namespace ctxkern
