// Gates, the products of contexts with a factor, and what their gradients give:
//
//   gates = c F    dgates_u = Σ products over the rows of u    dc = dgates F^T    dF = c^T dgates
//
// All in float32, context after context in the order of the call; sums are cut by sizes alone.
#pragma once

#include "../runtime/pack.h"
#include "../runtime/parallel.h"
#include "../runtime/sums.h"
#include "call.h"

namespace ctxkern {
namespace {

class Gating {
 public:
  static constexpr int64_t NR = 2 * VL;

  Gating(const GateCall& call, bool backward, char* workspace) : q(call) {
    Arena arena(workspace);
    contexts_ = arena.take(q.count * q.context_dim);
    gates_ = arena.take(q.count * lanes(q.rank));
    const bool turned = backward && q.dcontext;
    factor_ = arena.take(turned ? lanes(q.context_dim) * q.rank : lanes(q.rank) * q.context_dim);
    made_ = turned ? arena.take(q.count * lanes(q.context_dim)) : nullptr;
    sums_ = backward && q.dfactor ? arena.take(q.context_dim * lanes(q.rank)) : nullptr;
    bytes = arena.used();
  }

  void forward() const {
    if (q.rank == 0) return;
    lay_out_factor(q.factor.strides[0], q.factor.strides[1], q.context_dim, q.rank);
    each_piece(q.count, [&](int64_t u, int64_t count) {
      lay_out_contexts(u, count);
      const int64_t row = lanes(q.rank);
      product_in_pieces<F32>(count, round_up(q.rank, VL), q.context_dim, kDeepest,
                             left(contexts_ + u * q.context_dim, q.context_dim), {factor_, NR, q.context_dim * NR},
                             gates_ + u * row, row);
      for (int64_t i = u; i < u + count; ++i)
        std::memcpy(q.values + slot(i) * q.rank, gates_ + i * row, static_cast<size_t>(q.rank * 4));
    });
  }

  void backward() const {
    if (q.dcontext && q.count < q.table) std::memset(q.dcontext, 0, static_cast<size_t>(q.table * context_bytes()));
    if (q.dcontext) lay_out_factor(q.factor.strides[1], q.factor.strides[0], q.rank, q.context_dim);
    each_piece(q.count, [&](int64_t u, int64_t count) {
      for (int64_t i = u; i < u + count; ++i) sum(i);
      if (q.dfactor) lay_out_contexts(u, count);
      if (!q.dcontext) return;
      const int64_t row = lanes(q.context_dim);
      product_in_pieces<F32>(count, round_up(q.context_dim, VL), q.rank, kDeepest,
                             left(gates_ + u * lanes(q.rank), lanes(q.rank)), {factor_, NR, q.rank * NR},
                             made_ + u * row, row);
      for (int64_t i = u; i < u + count; ++i)
        write_vector(q.context.dtype, q.dcontext + slot(i) * context_bytes(), 1, made_ + i * row, q.context_dim);
    });
    if (!q.dfactor) return;
    each_piece(q.context_dim, [&](int64_t k, int64_t count) {
      const int64_t row = lanes(q.rank), size = size_of(q.factor.dtype);
      const Left turned{reinterpret_cast<const char*>(contexts_ + k), 4, q.context_dim * 4};
      product_in_pieces<F32>(count, round_up(q.rank, VL), q.count, kDeepest, turned, {gates_, row}, sums_ + k * row,
                             row);
      for (int64_t i = k; i < k + count; ++i)
        write_vector(q.factor.dtype, q.dfactor + i * q.rank * size, 1, sums_ + i * row, q.rank);
    });
  }

  int64_t bytes;

 private:
  // Rows of a piece at most, and rows of products whose sum is begun apart.
  static constexpr int64_t kRows = 32, kApart = 64;

  static int64_t lanes(int64_t n) { return round_up(n, NR); }
  static Left left(const float* data, int64_t row) { return {reinterpret_cast<const char*>(data), row * 4, 4}; }

  int64_t slot(int64_t u) const { return q.slot ? q.slot[u] : u; }
  int64_t context_bytes() const { return q.context_dim * size_of(q.context.dtype); }

  template <class F>
  void each_piece(int64_t rows, F&& f) const {
    const int64_t share = rows / (4 * q.threads) + 1, piece = share < kRows ? share : kRows;
    parallel<F32>(q.threads, (rows + piece - 1) / piece,
                  [&](int64_t i, int) { f(i * piece, rows - i * piece < piece ? rows - i * piece : piece); });
  }

  // In panels [steps, NR]; strides along the sum and from lane to lane.
  void lay_out_factor(int64_t row, int64_t column, int64_t steps, int64_t columns) const {
    const int64_t size = size_of(q.factor.dtype);
    with_source<F32>(q.factor.dtype, [&](auto type) {
      for (int64_t c = 0; c < columns; c += NR)
        pack_matrix<F32, decltype(type)::value>(factor_ + c * steps, q.factor.data + c * column * size, row * size,
                                                column * size, steps, columns - c < NR ? columns - c : NR);
    });
  }

  void lay_out_contexts(int64_t u, int64_t count) const {
    with_source<F32>(q.context.dtype, [&](auto type) {
      for (int64_t i = u; i < u + count; ++i)
        pack_left<F32, decltype(type)::value>(contexts_ + i * q.context_dim, q.context.data + slot(i) * context_bytes(),
                                              context_bytes(), 1, q.context_dim);
    });
  }

  // Of the products of a context's rows.
  void sum(int64_t u) const {
    const int64_t first = q.first ? q.first[u] : u, end = q.first ? q.first[u + 1] : u + 1;
    for (int64_t k = 0; k < lanes(q.rank); k += VL) {
      V total{};
      for (int64_t at = first; k < q.rank && at < end; at += kApart) {
        V part{};
        for (int64_t i = at; i < end && i < at + kApart; ++i) {
          const float* const row = q.products + (q.order ? q.order[i] : i) * q.rank + k;
          part += load_f32_first<Dtype::f32>(reinterpret_cast<const char*>(row), q.rank - k);
        }
        total += part;
      }
      store(gates_ + u * lanes(q.rank) + k, total);
    }
  }

  const GateCall& q;
  float *contexts_, *gates_, *factor_, *made_, *sums_;
};

inline int64_t gate_bytes(const GateCall& q, bool backward) { return Gating(q, backward, nullptr).bytes; }
inline void gates(const GateCall& q, char* workspace) { Gating(q, false, workspace).forward(); }
inline void gate_gradients(const GateCall& q, char* workspace) { Gating(q, true, workspace).backward(); }

}  // namespace
}  // namespace ctxkern
