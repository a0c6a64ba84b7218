// Where the fields of a problem lie, and what must hold before kernels read it.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "problem.h"

namespace ctxkern {

// Goes up with a change to what functions of the libraries take.
constexpr int kCalls = 4;

// "calls 4\nOperand 40\nOperand.data 0\n...": sizes of the structs and where their fields lie.
inline std::string problem_layout() {
  std::string text = "calls " + std::to_string(kCalls) + "\n";
  const auto add = [&](const char* name, size_t bytes) {
    text += std::string(name) + " " + std::to_string(bytes) + "\n";
  };
#define SIZE(type) add(#type, sizeof(type))
#define FIELD(type, field) add(#type "." #field, offsetof(type, field))
  SIZE(Operand);
  FIELD(Operand, data), FIELD(Operand, dtype), FIELD(Operand, strides);
  SIZE(Batch);
  FIELD(Batch, bounds), FIELD(Batch, index), FIELD(Batch, tokens), FIELD(Batch, sequences), FIELD(Batch, length);
  FIELD(Batch, table);
  SIZE(Projection);
  FIELD(Projection, d_out), FIELD(Projection, weight), FIELD(Projection, bilinear), FIELD(Projection, bias);
  FIELD(Projection, rows), FIELD(Projection, dweight), FIELD(Projection, dbilinear);
  SIZE(Problem);
  FIELD(Problem, batch), FIELD(Problem, x), FIELD(Problem, context), FIELD(Problem, dx), FIELD(Problem, dcontext);
  FIELD(Problem, d_in), FIELD(Problem, context_dim), FIELD(Problem, projections), FIELD(Problem, workspace_bytes);
  FIELD(Problem, threads), FIELD(Problem, tf32), FIELD(Problem, outer_above), FIELD(Problem, projection);
  SIZE(LoraProblem);
  FIELD(LoraProblem, batch), FIELD(LoraProblem, x), FIELD(LoraProblem, A), FIELD(LoraProblem, B);
  FIELD(LoraProblem, ranks), FIELD(LoraProblem, scales), FIELD(LoraProblem, rows), FIELD(LoraProblem, dx);
  FIELD(LoraProblem, dA), FIELD(LoraProblem, dB), FIELD(LoraProblem, d_in), FIELD(LoraProblem, d_out);
  FIELD(LoraProblem, rank), FIELD(LoraProblem, threads), FIELD(LoraProblem, tf32), FIELD(LoraProblem, adds);
  FIELD(LoraProblem, scale), FIELD(LoraProblem, kept_from), FIELD(LoraProblem, seed), FIELD(LoraProblem, gates);
  FIELD(LoraProblem, gate_rows), FIELD(LoraProblem, gate_of), FIELD(LoraProblem, products);
#undef FIELD
#undef SIZE
  return text;
}

namespace checks {

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// `size` elements that must be there.
inline void present(const void* data, int64_t size, const char* name) { require(size == 0 || data != nullptr, name); }

inline void known(Dtype dtype) { require(dtype >= Dtype::f32 && dtype <= Dtype::f16, "an unknown dtype"); }

// A parameter has the dtype of x, or one of both is float32.
inline void mixes(const Operand& parameter, Dtype x) {
  known(parameter.dtype);
  const bool same = parameter.dtype == x || parameter.dtype == Dtype::f32 || x == Dtype::f32;
  require(same || parameter.data == nullptr, "bfloat16 and float16 do not mix");
}

inline void check_batch(const Batch& batch) {
  for (const int64_t size : {batch.tokens, batch.sequences, batch.length, batch.table})
    require(size >= 0, "a size is negative");
  require(batch.bounds != nullptr || batch.sequences * batch.length == batch.tokens,
          "sequences do not make up the rows of x");
  require(batch.index != nullptr || batch.sequences <= batch.table,
          "the table has fewer rows than there are sequences");
}

}  // namespace checks

// Throws std::invalid_argument where kernels would read or write what is not there.
inline void check_problem(const Problem& q, bool backward) {
  using namespace checks;
  const Batch& batch = q.batch;
  require(q.projections >= 1 && q.projections <= kMaxProjections, "1 to 3 projections are taken");
  check_batch(batch);
  for (const int64_t size : {q.d_in, q.context_dim}) require(size >= 0, "a size is negative");
  present(q.x.data, batch.tokens * q.d_in, "x has no memory");
  present(q.context.data, batch.table * q.context_dim, "context has no memory");
  known(q.x.dtype);
  mixes(q.context, q.x.dtype);
  for (int64_t i = 0; i < q.projections; ++i) {
    const Projection& p = q.projection[i];
    require(p.d_out >= 0, "a size is negative");
    present(p.bilinear.data, q.d_in * p.d_out * q.context_dim, "bilinear has no memory");
    present(p.rows, batch.tokens * p.d_out, backward ? "a gradient of y has no memory" : "y has no memory");
    for (const Operand* each : {&p.weight, &p.bilinear, &p.bias, &p.dweight, &p.dbilinear}) mixes(*each, q.x.dtype);
  }
}

// Likewise, of what is no index: ranks may lie on a device.
inline void check_problem(const LoraProblem& q, bool backward) {
  using namespace checks;
  check_batch(q.batch);
  for (const int64_t size : {q.d_in, q.d_out, q.rank}) require(size >= 0, "a size is negative");
  const int64_t table = q.batch.table, N = q.batch.tokens;
  present(q.x.data, N * q.d_in, "x has no memory");
  present(q.A.data, table * q.rank * q.d_in, "A has no memory");
  present(q.B.data, table * q.rank * q.d_out, "B has no memory");
  present(q.rows, N * q.d_out, backward ? "a gradient of y has no memory" : "y has no memory");
  known(q.x.dtype);
  for (const Operand* each : {&q.A, &q.B}) mixes(*each, q.x.dtype);
  require(q.kept_from == 0 || q.seed != nullptr, "dropout has no seed");
}

inline void check_ranks(const LoraProblem& q) {
  for (int64_t u = 0; q.ranks && u < q.batch.table; ++u)
    checks::require(q.ranks[u] >= 0 && q.ranks[u] <= q.rank, "a rank lies outside 0 to R");
}

}  // namespace ctxkern
