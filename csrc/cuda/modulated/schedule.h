// Which kernels a call launches, in which order, on what part of the workspace.
#pragma once

#include <limits>
#include <type_traits>

#include "blocks.h"
#include "outer.h"

namespace ctxkern {

// Blocks in flight that keep a GPU busy: four times the multiprocessors of an H100.
constexpr int64_t kBusy = 528;
// What places and counts are computed in.
constexpr int64_t kMost = std::numeric_limits<int>::max();

// Whether tiles of 128 would compute more than an eighth of a size in vain.
inline bool wasted(int64_t size) { return ceil_div(size, 128) * 128 * 8 > size * 9; }

// The most contexts that there can be: how many differ is known on the device alone.
inline int64_t most_contexts(const Problem& q) { return std::min(q.batch.sequences, q.batch.table); }

inline bool outer(const Problem& q) { return static_cast<double>(most_contexts(q)) > q.outer_above; }

template <class F>
void over(int64_t size, int64_t step, F f) {
  for (int64_t at = 0; at < size; at += step) f(static_cast<int>(at), static_cast<int>(std::min(step, size - at)));
}

// C: dtype of x. P: dtype of products with parameters (panel.h). planes: into how many values a float32 parameter is split
// where nothing else is rounded; exact: where its product is not rounded either.
template <class C, class P, int planes, int exact>
class Modulated {
 public:
  Modulated(Launcher& launch, Call& q) : launch(launch), q(q) {}

  void forward() {
    if (outer(q)) return outer_forward();
    q.groups = group_rows(launch, q.batch, block_rows());
    for (int i = 0; i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      if (!p.d_out) continue;
      const Blocks blocks = forward_blocks(q.d_in, p.d_out, q.groups.limit, sizeof(C), q.workspace_bytes);
      C* panel = part<C>(i, blocks.rows * blocks.columns * blocks.group);
      over(p.d_out, blocks.columns, [&](int e_begin, int e_size) {
        over(q.groups.limit, blocks.group, [&](int u_begin, int u_size) {
          const Block block{0, static_cast<int>(q.d_in), e_begin, e_size, u_begin, u_size};
          panel_weights(p, block, panel);
          by_tile(e_size, [&](auto tile) { panel_y<decltype(tile)>(p, block, panel); });
        });
      });
    }
  }

  void backward() {
    zero_dcontext();
    if (outer(q)) return outer_backward();
    q.groups = group_rows(launch, q.batch, block_rows());
    const bool contexts = q.dcontext && q.context_dim;
    const int64_t limit = q.groups.limit, row = limit * q.context_dim * static_cast<int64_t>(sizeof(float));
    const int64_t share = contexts ? std::min(q.workspace_bytes / 4, kBusy * row) : 0;
    int64_t widest = 0;
    for (int i = 0; i < q.projections; ++i) widest = std::max(widest, q.projection[i].d_out);
    const Blocks blocks = backward_blocks(q.d_in, widest, q.context_dim, limit, sizeof(C), q.workspace_bytes - share);
    // G, and when it has been read W
    C* panel = launch.take<C>(blocks.rows * blocks.columns * blocks.group);
    float* sums =
        blocks.group < limit ? launch.take<float>(blocks.rows * blocks.columns * (q.context_dim + 1)) : nullptr;
    Ranges ranges{};
    int64_t pieces = 0, piece = 0;
    float* partial = nullptr;
    if (contexts) {
      ranges = ranges_of(blocks, std::max<int64_t>(1, share / std::max<int64_t>(row, 1)));
      partial = launch.take<float>(ranges.count * limit * q.context_dim);
      launch.zero(partial, ranges.count * row);
    }
    for (int i = 0; i < q.projections; ++i) pieces += ceil_div(q.projection[i].d_out, blocks.columns);
    float* dx_sums = q.dx && pieces > 1 ? launch.take<float>(q.batch.tokens * blocks.rows) : nullptr;
    over(q.d_in, blocks.rows, [&](int d_begin, int d_size) {
      piece = 0;
      for (int i = 0; i < q.projections; ++i) {
        const Projection& p = q.projection[i];
        over(p.d_out, blocks.columns, [&](int e_begin, int e_size) {
          over(limit, blocks.group, [&](int u_begin, int u_size) {
            const Block block{d_begin, d_size, e_begin, e_size, u_begin, u_size};
            const bool parameters = p.dbilinear.data || p.dweight.data;
            if (parameters || contexts) panel_g(p, block, panel);
            if (contexts) panel_dcontext(p, block, panel, partial, ranges);
            if (parameters) panel_dbilinear(p, block, panel, sums, u_begin > 0, u_begin + u_size >= limit);
            if (!q.dx) return;
            panel_weights(p, block, panel);
            by_tile(d_size, [&](auto tile) {
              panel_dx<decltype(tile)>(p, block, panel, dx_sums, piece > 0, piece + 1 == pieces);
            });
          });
          ++piece;
        });
      }
    });
    if (contexts)
      launch("panel_dcontext_sum", panel_dcontext_sum_kernel<C>, limit, ceil_div(q.context_dim, 32), 1, kSumThreads,
             kSumShared, q, partial, static_cast<int>(ranges.count));
  }

 private:
  // Rows of the table that no sequence uses have a gradient of zero.
  void zero_dcontext() {
    if (q.dcontext) launch.zero(q.dcontext, q.batch.table * q.context_dim * size_of(q.context.dtype));
  }

  // What a sum over rows and columns of a block is cut into.
  struct Ranges {
    int64_t rows, columns, parts, count;
  };

  // At most `fit`, and as many as keep a GPU busy: of rows, then of columns too.
  Ranges ranges_of(const Blocks& blocks, int64_t fit) const {
    const int64_t most = kMost / (blocks.columns + kChunk<C>), wanted = std::min(fit, kBusy);
    const int64_t rows = std::min(most, ceil_div(blocks.rows, std::min(blocks.rows, wanted)));
    const int64_t high = ceil_div(blocks.rows, rows), wide = std::min(wanted / high, ceil_div(blocks.columns, 256));
    const int64_t columns = ceil_div(ceil_div(blocks.columns, std::max<int64_t>(1, wide)), 64) * 64;
    const int64_t parts = ceil_div(blocks.columns, columns);
    return {rows, columns, parts, high * parts};
  }

  // A buffer of the first projection's size or of what a later one needs beyond it.
  template <class T>
  T* part(int i, int64_t count) {
    if (i == 0 || count > held) {
      held = count;
      at = launch.take<T>(count);
    }
    return static_cast<T*>(at);
  }

  // Rows of a tile: large ones where contexts fill them and products are of halves.
  int block_rows() const {
    const int64_t each = q.batch.tokens / std::max<int64_t>(1, std::min(q.batch.sequences, q.batch.table));
    return sizeof(C) == 2 && each >= LargeTile::kM && q.d_in >= 64 ? LargeTile::kM : SmallTile::kM;
  }

  // f of the tile for rows of contexts by `columns`; large ones are for halves alone.
  template <class F>
  void by_tile(int columns, F f) {
    if constexpr (sizeof(C) == 2) {
      if (q.groups.block != SmallTile::kM) return wasted(columns) ? f(HighTile{}) : f(LargeTile{});
    }
    f(SmallTile{});
  }

  void panel_weights(const Projection& p, const Block& block, C* panel) {
    const int64_t pieces = block.d_size * ceil_div(block.e_size, WeightsTile::kN);
    launch("panel_weights", panel_weights_kernel<P, C>, pieces * ceil_div(block.u_size, WeightsTile::kM), 1, 1,
           WeightsTile::kThreads, PanelWeightsProduct<P, C>::kShared, q, p, block, panel);
  }

  template <class T>
  void panel_y(const Projection& p, const Block& block, C* panel) {
    launch("panel_y", panel_y_kernel<C, T>, q.groups.tiles * ceil_div(block.e_size, T::kN), 1, 1, T::kThreads,
           PanelYProduct<C, T>::kShared, q, p, block, panel);
  }

  void panel_g(const Projection& p, const Block& block, C* products) {
    if constexpr (sizeof(C) == 2) {
      const bool wide = block.d_size >= WideTile::kM && block.e_size >= WideTile::kN;
      if (wide && wasted(block.d_size)) return panel_g_by<WideTile>(p, block, products);
      if (wide) return panel_g_by<LargeTile>(p, block, products);
    }
    panel_g_by<SmallTile>(p, block, products);
  }

  template <class T>
  void panel_g_by(const Projection& p, const Block& block, C* products) {
    launch("panel_g", panel_g_kernel<C, T>, ceil_div(block.d_size, T::kM) * ceil_div(block.e_size, T::kN), block.u_size,
           1, T::kThreads, PanelGProduct<C, T>::kShared, q, p, block, products);
  }

  template <class T>
  void panel_dx(const Projection& p, const Block& block, C* panel, float* sums, bool started, bool last) {
    launch("panel_dx", panel_dx_kernel<C, T>, q.groups.tiles * ceil_div(block.d_size, T::kN), 1, 1, T::kThreads,
           PanelDxProduct<C, T>::kShared, q, p, block, panel, sums, started, last);
  }

  void panel_dbilinear(const Projection& p, const Block& block, C* products, float* sums, bool started, bool last) {
    if (q.context_dim <= NarrowTile::kN) return panel_dbilinear_by<NarrowTile>(p, block, products, sums, started, last);
    panel_dbilinear_by<SmallTile>(p, block, products, sums, started, last);
  }

  template <class T>
  void panel_dbilinear_by(const Projection& p, const Block& block, C* products, float* sums, bool started, bool last) {
    const int64_t blocks_k = p.dbilinear.data ? std::max<int64_t>(1, ceil_div(q.context_dim, T::kN)) : 1;
    launch("panel_dbilinear", panel_dbilinear_kernel<P, C, T, planes>, block.d_size * ceil_div(block.e_size, T::kM),
           blocks_k, 1, T::kThreads, PanelDbilinearProduct<P, C, T, planes>::kShared, q, p, block, products, sums,
           started, last);
  }

  void panel_dcontext(const Projection& p, const Block& block, C* products, float* partial, const Ranges& ranges) {
    const bool least = q.context_dim <= LeastTile::kN && block.u_size <= LeastTile::kM;
    if (least) return panel_dcontext_by<LeastTile>(p, block, products, partial, ranges);
    panel_dcontext_by<SmallTile>(p, block, products, partial, ranges);
  }

  template <class T>
  void panel_dcontext_by(const Projection& p, const Block& block, C* products, float* partial, const Ranges& ranges) {
    launch("panel_dcontext", panel_dcontext_kernel<P, C, T, planes>, ceil_div(block.u_size, T::kM),
           ceil_div(q.context_dim, T::kN), ceil_div(block.d_size, ranges.rows) * ranges.parts, T::kThreads,
           PanelDcontextProduct<P, C, T, planes>::kShared, q, p, block, products, partial,
           static_cast<int>(ranges.rows), static_cast<int>(ranges.parts), static_cast<int>(ranges.columns));
  }

  // Rows of D of a split, at least `least`, so that there are blocks enough and their sums fit.
  int64_t step_of(int64_t blocks, int64_t bytes_each, int64_t least) const {
    const int64_t fit = std::max<int64_t>(1, q.workspace_bytes / std::max<int64_t>(bytes_each, 1));
    const int64_t wanted = std::min(ceil_div(kBusy, std::max<int64_t>(blocks, 1)), ceil_div(q.d_in, least));
    const int64_t step = ceil_div(ceil_div(q.d_in, std::min(wanted, fit)), least) * least;
    return std::min(step, std::max<int64_t>(1, kMost / (q.context_dim + kChunk<C>)));
  }

  void outer_forward() {
    q.slots = find_slots(launch, q.batch);
    for (int i = 0; i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      if (!p.d_out) continue;
      if (q.batch.tokens <= FewTile::kM) {
        outer_y_by<FewTile>(p, i);
      } else if (q.batch.tokens <= WeightsTile::kM) {
        outer_y_by<WeightsTile>(p, i);
      } else {
        outer_y_by<SmallTile>(p, i);
      }
    }
  }

  template <class T>
  void outer_y_by(const Projection& p, int i) {
    const int64_t blocks = ceil_div(q.batch.tokens, T::kM) * ceil_div(p.d_out, T::kN), size = q.batch.tokens * p.d_out;
    const int64_t step = step_of(blocks, size * static_cast<int64_t>(sizeof(float)), 16);
    const int64_t splits = ceil_div(q.d_in, step);
    float* sums = splits > 1 ? part<float>(i, splits * size) : nullptr;
    launch("outer_y", outer_y_kernel<P, C, T>, blocks, splits, 1, T::kThreads, kOuterShared<P, C, T>, q, p, sums,
           static_cast<int>(step));
    if (sums)
      launch("outer_y_sum", outer_y_sum_kernel<C>, ceil_div(size, 256), 1, 1, 256, 0, q, p, sums,
             static_cast<int>(splits));
  }

  void outer_backward() {
    q.slots = find_slots(launch, q.batch);
    const bool contexts = q.dcontext && q.context_dim;
    const bool narrow = q.context_dim <= NarrowOuterDxTile::kN;
    const int64_t width = narrow ? NarrowOuterDxTile::kN : OuterDxTile::kN, blocks_k = ceil_div(q.context_dim, width);
    const int64_t row_blocks = ceil_div(q.batch.tokens, SmallTile::kM), d_blocks = ceil_div(q.d_in, SmallTile::kM);
    int64_t weighted = 0, pieces = 0;
    for (int i = 0; i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      const int64_t e_blocks = ceil_div(p.d_out, SmallTile::kN);
      if (p.dweight.data)
        launch("outer_dweight", outer_dweight_kernel<C>, d_blocks * e_blocks, 1, 1, SmallTile::kThreads,
               OuterDweightProduct<C>::kShared, q, p);
      // where parameters are wider than x, so are their gradients
      using G = std::conditional_t<(planes > 1), float, C>;
      if (p.dbilinear.data) outer_dbilinear<G>(p);
      weighted += p.weight.data != nullptr && p.d_out;
      pieces += p.d_out ? std::max<int64_t>(1, blocks_k) : 0;
    }
    if (!q.dx && !contexts) return;
    float* dx_sums = q.dx && (weighted || pieces > 1) ? launch.take<float>(q.batch.tokens * q.d_in) : nullptr;
    bool started = false;
    for (int i = 0; q.dx && i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      if (!p.weight.data || !p.d_out) continue;
      launch("outer_weight_dx", outer_weight_dx_kernel<P, C>, row_blocks * d_blocks, 1, 1, SmallTile::kThreads,
             OuterWeightDxProduct<P, C>::kShared, q, p, dx_sums, started);
      started = true;
    }
    const int64_t step = step_of(row_blocks, q.batch.tokens * q.context_dim * static_cast<int64_t>(sizeof(float)), 4);
    const int64_t splits = ceil_div(q.d_in, step);
    float* partial = contexts ? launch.take<float>(splits * q.batch.tokens * q.context_dim) : nullptr;
    int64_t piece = 0;
    bool added = false;
    for (int i = 0; i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      if (!p.d_out) continue;
      for (int64_t k0 = 0; k0 < std::max<int64_t>(q.context_dim, 1); k0 += width) {
        const OuterDx now{dx_sums, partial, k0, step, splits, started, ++piece == pieces, added};
        if (narrow) {
          outer_dx<NarrowOuterDxTile>(p, now);
        } else {
          outer_dx<OuterDxTile>(p, now);
        }
        started = true;
      }
      added = true;
    }
    if (!contexts) return;
    q.groups = group_rows(launch, q.batch, SmallTile::kM);
    launch("outer_dcontext_sum", outer_dcontext_sum_kernel<C>, q.groups.limit, ceil_div(q.context_dim, 32), 1,
           kSumThreads, kSumShared, q, partial, static_cast<int>(splits));
  }

  struct OuterDx {
    float *dx_sums, *partial;
    int64_t k0, step, splits;
    bool started, last, added;
  };

  template <class T>
  void outer_dx(const Projection& p, const OuterDx& now) {
    launch("outer_dx", outer_dx_kernel<P, C, T, exact>, ceil_div(q.batch.tokens, T::kM), now.splits, 1, T::kThreads,
           OuterDxProduct<P, C, T, exact>::kShared, q, p, now.dx_sums, now.partial, static_cast<int>(now.k0),
           static_cast<int>(now.step), now.started, now.last, now.added);
  }

  // G: the dtype of products.
  template <class G>
  void outer_dbilinear(const Projection& p) {
    if (q.context_dim <= NarrowTile::kN) return outer_dbilinear_by<G, NarrowTile>(p);
    outer_dbilinear_by<G, SmallTile>(p);
  }

  template <class G, class T>
  void outer_dbilinear_by(const Projection& p) {
    launch("outer_dbilinear", outer_dbilinear_kernel<G, C, T>, q.d_in * ceil_div(p.d_out, T::kM),
           ceil_div(q.context_dim, T::kN), 1, T::kThreads, OuterDbilinearProduct<G, C, T>::kShared, q, p);
  }

  Launcher& launch;
  Call& q;
  int64_t held = 0;
  void* at = nullptr;
};

}  // namespace ctxkern
