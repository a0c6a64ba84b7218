// What the kernels of the CPU take: the problem, its rows by adapter, and how a call is cut.
#pragma once

#include "../../problem.h"
#include "../runtime/rows.h"

namespace ctxkern {

// Grouped rows `first` and on, all of one adapter.
struct LoraBlock {
  int64_t adapter, first, count;
  int64_t row;         // row of x of the first, where they lie together
  const int64_t* map;  // row of x of each, where not
};

struct LoraCall : LoraProblem {
  const Rows* rows_of;
  const LoraBlock* blocks;
  const int64_t* block_first;  // [U + 1]
  Operand base, bias;  // weight [E, D] and bias [E] of the linear layer, where its product is made with the update
  bool turned;         // dA is [D, R] and dB [R, E] in memory: A and B are views of factors that lie so
  Operand dweight;     // of that weight, where it is made with dA and dB: without gaps, or turned

  int64_t adapters() const { return rows_of->contexts; }
  int64_t block_count() const { return block_first[adapters()]; }
  int64_t slot(int64_t u) const { return rows_of->slot[u]; }
  int64_t rank_of(int64_t u) const { return ranks ? ranks[slot(u)] : rank; }
};

// Rows of a block, at most: sums over rows are cut into as many.
constexpr int64_t kBlockRows = 256;

// Whether the product with the base weight goes along with the update: all rows are in a block, and blocks are long enough for
// a weight that each of them reads. In bfloat16 torch's product, which reads it once for all, takes less time where they are
// not, and the more rows it takes the farther away the panels of the weight lie; in float32 torch's is slower, and a base
// product by itself takes less time than one that reads more than 4 MiB for each block (bench/LOG.md).
inline bool takes_base(const LoraCall& q) {
  const int64_t bytes = q.d_in * q.d_out * size_of(q.x.dtype);
  const bool floats = q.x.dtype == Dtype::f32;
  const int64_t rows = floats || bytes <= 1 << 20 ? 16 : bytes <= 4 << 20 ? 20 : 48;
  return q.batch.tokens > 0 && q.rows_of->count == q.batch.tokens && q.batch.tokens >= rows * q.block_count() &&
         bytes <= (floats ? 4 << 20 : 8 << 20);
}

// Whether the gradient of the base weight is made with dA and dB: there are rows, all of one adapter, so that those of x and
// dy are laid out once for all three (bench/LOG.md).
inline bool takes_weight(const LoraCall& q) {
  return q.batch.tokens > 0 && q.rows_of->count == q.batch.tokens && q.adapters() == 1;
}

// The gates of a factored call (gates.h). Of gradients: those that are asked for are not null.
struct GateCall {
  Operand context;  // [table, K], without gaps
  Operand factor;   // [K, R]
  int64_t table, context_dim, rank, threads;
  int64_t count;                 // U, contexts that rows of x use
  const int64_t* slot;           // [U] row of the table of each; null: in order
  float* values;                 // [table, R], which a forward writes: rows of those in use
  const float* products;         // [N, R] gradients of the gates of each row of x
  const int64_t *first, *order;  // as `Rows` has them; null: a row for each context, in order
  char *dcontext, *dfactor;      // like the context, and like the factor without gaps
};

// The entry points of one instruction set.
struct LoraKernels {
  int64_t (*bytes)(const LoraCall&, bool backward);  // of workspace
  void (*forward)(const LoraCall&, char* workspace);
  void (*backward)(const LoraCall&, char* workspace);
  // null but in those of float32
  int64_t (*gate_bytes)(const GateCall&, bool backward);
  void (*gates)(const GateCall&, char* workspace);
  void (*gate_gradients)(const GateCall&, char* workspace);
};

}  // namespace ctxkern
