// Which kernels a call launches, and how its columns are shared by blocks.
#pragma once

#include <algorithm>

#include "../runtime/launch.h"
#include "gradients.h"

namespace ctxkern {

// Blocks that keep a GPU busy: twice the multiprocessors of an H100, as more of them make h or g anew more often.
constexpr int64_t kEnough = 264;
// Rows of an adapter for which those blocks make dA and dB; the fewest that a block takes. Counted, not measured.
constexpr int64_t kManyRows = 4096, kFewRows = 256;

// C, P and S as in kernels.h.
template <class C, class P, class S>
class Lora {
 public:
  Lora(Launcher& launch, LoraCall& q) : launch(launch), q(q) {}

  void forward() {
    if (!q.d_out || (q.adds && !q.rank)) return;
    group();
    by_rank(RankTile{}, FewRanksTile{}, [&](auto tile) {
      using T = decltype(tile);
      const Cut cut = cut_of(q.d_out);
      launch("lora_y", lora_y_kernel<C, P, S, T>, q.groups.tiles * cut.parts, 1, 1, T::kThreads,
             kUpdateStaged<C, P, S, T> + held_bytes<S>(q.rank), q, cut.parts, cut.columns);
    });
  }

  void backward() {
    zero_unused();
    group();
    const int64_t held = q.batch.tokens * q.rank;
    q.h = q.dB ? reinterpret_cast<char*>(launch.take<S>(held)) : nullptr;
    q.g = q.dA ? reinterpret_cast<char*>(launch.take<S>(held)) : nullptr;
    by_rank(RankTile{}, FewRanksTile{}, [&](auto tile) {
      using T = decltype(tile);
      const Cut cut = cut_of(q.dx ? q.d_in : 1);
      launch("lora_dx", lora_dx_kernel<C, P, S, T>, q.groups.tiles * cut.parts, 1, 1, T::kThreads,
             kDxStaged<C, P, S, T> + held_bytes<S>(q.rank), q, cut.parts, cut.columns);
    });
    by_rank(GradientTile{}, FewRanksGradientTile{}, [&](auto tile) {
      using T = decltype(tile);
      const int64_t of_a = q.dA ? ceil_div(q.d_in, T::kM) : 0, of_b = q.dB ? ceil_div(q.d_out, T::kM) : 0;
      const int64_t blocks = ceil_div(q.rank, T::kN);
      const Chunks chunks = chunks_of((ceil_div(q.d_in, T::kM) + ceil_div(q.d_out, T::kM)) * blocks);
      launch("lora_dab", lora_dab_kernel<C, S, T>, (q.groups.limit + chunks.later) * (of_a + of_b), blocks, 1,
             T::kThreads, GradientsProduct<S, C, T>::kShared, q, chunks, of_a, of_a + of_b);
      const int64_t pieces = ceil_div(chunks.size(q), kDabSumThreads);
      launch("lora_dab_sum", lora_dab_sum_kernel<C>, chunks.later * pieces, 1, 1, kDabSumThreads, 0, q, chunks, pieces);
    });
  }

 private:
  struct Cut {
    int64_t parts, columns;
  };

  // Columns of y or dx, cut where there are few tiles of rows.
  Cut cut_of(int64_t width) const {
    const int64_t strips = std::max<int64_t>(1, ceil_div(width, ColumnsTile::kN));
    const int64_t wanted = std::min(strips, ceil_div(kEnough, std::max<int64_t>(1, q.groups.tiles)));
    const int64_t each = ceil_div(strips, wanted);
    return {ceil_div(strips, each), each * ColumnsTile::kN};
  }

  // Of rows for dA and dB; blocks: of an adapter's. By widths and ranks alone, as nothing else may move an adapter's sums,
  // and so many that these take no more bytes than x and dy of halves.
  Chunks chunks_of(int64_t blocks) {
    int64_t rows = kFewRows;
    while (rows < kManyRows * blocks / kEnough || rows < 4 * q.rank) rows *= 2;
    const bool several = q.batch.tokens > rows && !(q.groups.uniform && q.batch.length <= rows);
    const int64_t windows = several ? ceil_div(q.batch.tokens, rows) : 0;
    Chunks chunks{rows, static_cast<int>(several ? windows - 1 : 0), nullptr};
    if (several) chunks.sums = launch.take<float>(2 * windows * chunks.size(q));
    return chunks;
  }

  void group() { q.groups = group_rows(launch, q.batch, RankTile::kM, true); }

  template <class Many, class Few, class F>
  void by_rank(Many many, Few few, F f) {
    if (q.rank > FewRanksTile::kN) return f(many);
    f(few);
  }

  // Adapters that no sequence uses have a gradient of zero; which are used is known on the device alone.
  void zero_unused() {
    const Batch& batch = q.batch;
    if (!batch.index && !batch.bounds && batch.sequences == batch.table) return;
    const int64_t each = batch.table * q.rank;
    if (q.dA) launch.zero(q.dA, each * q.d_in * size_of(q.A.dtype));
    if (q.dB) launch.zero(q.dB, each * q.d_out * size_of(q.B.dtype));
  }

  Launcher& launch;
  LoraCall& q;
};

}  // namespace ctxkern
