// The modulated operators: which kernels are launched, in which order, on what part of the workspace.

#include <string>
#include <type_traits>

#include "blocks.h"
#include "outer.h"

namespace ctxkern {
namespace {

// Blocks in flight that keep a GPU busy: twice the multiprocessors of an H100.
constexpr int64_t kBusy = 264;

template <class F>
void over(int64_t size, int64_t step, F f) {
  for (int64_t at = 0; at < size; at += step) f(static_cast<int>(at), static_cast<int>(std::min(step, size - at)));
}

void group_rows(Launcher& launch, Problem& q, int block) {
  Groups& g = q.groups;
  const bool indexed = q.index != nullptr;
  g.block = block;
  g.uniform = !indexed && !q.bounds;
  g.ordered = indexed;
  if (g.uniform) {
    g.limit = static_cast<int>(q.sequences);
    g.tiles = static_cast<int>(q.sequences * ceil_div(q.length, block));
    return;
  }
  g.limit = static_cast<int>(std::min(q.sequences, q.table));
  g.tiles = static_cast<int>(q.tokens / block + g.limit);
  g.buffer = launch.take<int>(4 + 3 * g.limit + g.tiles + (indexed ? q.tokens : 0));
  int* seen = launch.take<int>(4 * q.sequences);
  if (indexed)
    launch("seen", seen_kernel, ceil_div(q.sequences, kGroupThreads), 1, 1, kGroupThreads, 0, q, seen);
  launch("number", number_kernel, 1, 1, 1, kGroupThreads, kNumberShared, q, seen);
  launch("place", place_kernel, q.sequences, 1, 1, kGroupThreads, 0, q, seen);
}

// C: dtype of x. planes: into how many halves a float32 parameter is split where nothing else is rounded; exact: where
// its product is not rounded either.
template <class C, int planes, int exact>
class Modulated {
 public:
  Modulated(Launcher& launch, Problem& q) : launch(launch), q(q) {}

  void forward() {
    if (q.outer) return outer_forward();
    group_rows(launch, q, block_rows());
    for (int i = 0; i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      if (!p.d_out) continue;
      const Blocks blocks = forward_blocks(q.d_in, p.d_out, q.groups.limit, sizeof(C), q.workspace_bytes);
      C* panel = part<C>(i, blocks.rows * blocks.columns * blocks.group);
      over(p.d_out, blocks.columns, [&](int e_begin, int e_size) {
        over(q.groups.limit, blocks.group, [&](int u_begin, int u_size) {
          const Block block{0, static_cast<int>(q.d_in), e_begin, e_size, u_begin, u_size};
          make(p, block, panel);
          if (q.groups.block == LargeTile::kM) {
            project<LargeTile>(p, block, panel);
          } else {
            project<SmallTile>(p, block, panel);
          }
        });
      });
    }
  }

  void backward() {
    if (q.outer) return outer_backward();
    group_rows(launch, q, block_rows());
    const bool contexts = q.dcontext.data && q.context_dim;
    const int64_t share = contexts ? q.workspace_bytes / 4 : 0, limit = q.groups.limit;
    int64_t widest = 0;
    for (int i = 0; i < q.projections; ++i) widest = std::max(widest, q.projection[i].d_out);
    const Blocks blocks =
        backward_blocks(q.d_in, widest, q.context_dim, limit, sizeof(C), q.workspace_bytes - share);
    const int64_t area = blocks.rows * blocks.columns;
    C* panel = launch.take<C>(area * blocks.group);
    C* products = launch.take<C>(area * blocks.group);
    float* sums = blocks.group < limit ? launch.take<float>(area * (q.context_dim + 1)) : nullptr;
    int64_t ranges = 0, rows = 0, pieces = 0, piece = 0;
    float* partial = nullptr;
    if (contexts) {
      const int64_t fit = std::max<int64_t>(1, share / (limit * q.context_dim * static_cast<int64_t>(sizeof(float))));
      ranges = std::min({fit, blocks.rows, kBusy});
      rows = ceil_div(blocks.rows, ranges);
      ranges = ceil_div(blocks.rows, rows);
      partial = launch.take<float>(ranges * limit * q.context_dim);
      launch.zero(partial, ranges * limit * q.context_dim * static_cast<int64_t>(sizeof(float)));
    }
    for (int i = 0; i < q.projections; ++i) pieces += ceil_div(q.projection[i].d_out, blocks.columns);
    float* dx_sums = q.dx && pieces > 1 ? launch.take<float>(q.tokens * blocks.rows) : nullptr;
    over(q.d_in, blocks.rows, [&](int d_begin, int d_size) {
      piece = 0;
      for (int i = 0; i < q.projections; ++i) {
        const Projection& p = q.projection[i];
        over(p.d_out, blocks.columns, [&](int e_begin, int e_size) {
          over(limit, blocks.group, [&](int u_begin, int u_size) {
            const Block block{d_begin, d_size, e_begin, e_size, u_begin, u_size};
            const bool spreads = p.dbilinear.data || p.dweight.data;
            if (spreads || contexts) gather(p, block, products);
            if (contexts) sum_dcontext(p, block, products, partial, rows);
            if (spreads) spread(p, block, products, sums, u_begin > 0, u_begin + u_size >= limit);
            if (!q.dx) return;
            make(p, block, panel);
            if (q.groups.block == LargeTile::kM) {
              turn<LargeTile>(p, block, panel, dx_sums, piece > 0, piece + 1 == pieces);
            } else {
              turn<SmallTile>(p, block, panel, dx_sums, piece > 0, piece + 1 == pieces);
            }
          });
          ++piece;
        });
      }
    });
    if (contexts)
      launch("sum_partials", sum_partials_kernel<C>, limit, 1, 1, 128, 0, q, partial, static_cast<int>(ranges));
  }

 private:
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
    const int64_t each = q.tokens / std::max<int64_t>(1, std::min(q.sequences, q.table));
    return sizeof(C) == 2 && each >= LargeTile::kM && q.d_in >= 64 ? LargeTile::kM : SmallTile::kM;
  }

  void make(const Projection& p, const Block& block, C* panel) {
    const int64_t pieces = block.d_size * ceil_div(block.e_size, MakeTile::kN);
    launch("make", make_kernel<C>, pieces * ceil_div(block.u_size, MakeTile::kM), 1, 1, MakeTile::kThreads,
           MakeProduct<C>::kShared, q, p, block, panel);
  }

  template <class T>
  void project(const Projection& p, const Block& block, C* panel) {
    if constexpr (sizeof(C) == 2 || std::is_same_v<T, SmallTile>)
      launch("project", project_kernel<C, T>, q.groups.tiles * ceil_div(block.e_size, T::kN), 1, 1, T::kThreads,
             ProjectProduct<C, T>::kShared, q, p, block, panel);
  }

  void gather(const Projection& p, const Block& block, C* products) {
    using T = std::conditional_t<sizeof(C) == 2, LargeTile, SmallTile>;
    if (sizeof(C) == 2 && (block.d_size < T::kM || block.e_size < T::kN)) return gather_by<SmallTile>(p, block, products);
    gather_by<T>(p, block, products);
  }

  template <class T>
  void gather_by(const Projection& p, const Block& block, C* products) {
    launch("gather", gather_kernel<C, T>, ceil_div(block.d_size, T::kM) * ceil_div(block.e_size, T::kN), block.u_size, 1,
           T::kThreads, GatherProduct<C, T>::kShared, q, p, block, products);
  }

  template <class T>
  void turn(const Projection& p, const Block& block, C* panel, float* sums, bool started, bool last) {
    if constexpr (sizeof(C) == 2 || std::is_same_v<T, SmallTile>)
      launch("turn", turn_kernel<C, T>, q.groups.tiles * ceil_div(block.d_size, T::kN), 1, 1, T::kThreads,
             TurnProduct<C, T>::kShared, q, p, block, panel, sums, started, last);
  }

  void spread(const Projection& p, const Block& block, C* products, float* sums, bool started, bool last) {
    const int64_t blocks_k = p.dbilinear.data ? std::max<int64_t>(1, ceil_div(q.context_dim, SmallTile::kN)) : 1;
    launch("spread", spread_kernel<C, planes>, block.d_size * ceil_div(block.e_size, SmallTile::kM), blocks_k, 1,
           SmallTile::kThreads, SpreadProduct<C, planes>::kShared, q, p, block, products, sums, started, last);
  }

  void sum_dcontext(const Projection& p, const Block& block, C* products, float* partial, int64_t rows) {
    launch("dcontext", dcontext_kernel<C, planes>, ceil_div(block.u_size, SmallTile::kM),
           ceil_div(q.context_dim, SmallTile::kN), ceil_div(block.d_size, rows), SmallTile::kThreads,
           ContextProduct<C, planes>::kShared, q, p, block, products, partial, static_cast<int>(rows));
  }

  void find_slots() {
    if (q.per_token) return;
    q.slots = launch.take<int>(q.tokens);
    launch.zero(q.slots, q.tokens * static_cast<int64_t>(sizeof(int)));
    launch("slots", slots_kernel, q.sequences, 1, 1, kGroupThreads, 0, q);
  }

  // Rows of D of a split, so that there are blocks enough and their sums fit.
  int64_t step_of(int64_t blocks, int64_t bytes_each) const {
    const int64_t fit = std::max<int64_t>(1, q.workspace_bytes / std::max<int64_t>(bytes_each, 1));
    const int64_t wanted = std::min(ceil_div(kBusy, std::max<int64_t>(blocks, 1)), ceil_div(q.d_in, 16));
    return ceil_div(ceil_div(q.d_in, std::min(wanted, fit)), 16) * 16;
  }

  void outer_forward() {
    find_slots();
    for (int i = 0; i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      if (!p.d_out) continue;
      const int64_t blocks = ceil_div(q.tokens, SmallTile::kM) * ceil_div(p.d_out, SmallTile::kN);
      const int64_t size = q.tokens * p.d_out, step = step_of(blocks, size * static_cast<int64_t>(sizeof(float)));
      const int64_t splits = ceil_div(q.d_in, step);
      float* sums = splits > 1 ? part<float>(i, splits * size) : nullptr;
      const size_t shared = std::max(OuterProduct<C>::kShared, WeightProduct<C>::kShared);
      launch("outer_forward", outer_forward_kernel<C>, blocks, splits, 1, SmallTile::kThreads, shared, q, p, sums,
             static_cast<int>(step));
      if (sums)
        launch("outer_sum", outer_sum_kernel<C>, ceil_div(size, 256), 1, 1, 256, 0, q, p, sums,
               static_cast<int>(splits));
    }
  }

  void outer_backward() {
    find_slots();
    const bool contexts = q.dcontext.data && q.context_dim;
    const int64_t blocks_k = ceil_div(q.context_dim, SmallTile::kN), row_blocks = ceil_div(q.tokens, SmallTile::kM);
    const int64_t d_blocks = ceil_div(q.d_in, SmallTile::kM);
    int64_t weighted = 0, pieces = 0;
    for (int i = 0; i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      const int64_t e_blocks = ceil_div(p.d_out, SmallTile::kN);
      if (p.dweight.data)
        launch("dweight", dweight_kernel<C>, d_blocks * e_blocks, 1, 1, SmallTile::kThreads,
               GradientProduct<C>::kShared, q, p);
      if (p.dbilinear.data) spread_outer(p, q.d_in * e_blocks, blocks_k);
      weighted += p.weight.data != nullptr && p.d_out;
      pieces += p.d_out ? std::max<int64_t>(1, blocks_k) : 0;
    }
    if (!q.dx && !contexts) return;
    float* dx_sums = q.dx && (weighted || pieces > 1) ? launch.take<float>(q.tokens * q.d_in) : nullptr;
    bool started = false;
    for (int i = 0; q.dx && i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      if (!p.weight.data || !p.d_out) continue;
      launch("weight_turn", weight_turn_kernel<C>, row_blocks * d_blocks, 1, 1, SmallTile::kThreads,
             TransposedProduct<C>::kShared, q, p, dx_sums, started);
      started = true;
    }
    const int64_t step = step_of(row_blocks, q.tokens * q.context_dim * static_cast<int64_t>(sizeof(float)));
    const int64_t splits = ceil_div(q.d_in, step);
    float* partial = contexts ? launch.take<float>(splits * q.tokens * q.context_dim) : nullptr;
    int64_t piece = 0;
    bool added = false;
    for (int i = 0; i < q.projections; ++i) {
      const Projection& p = q.projection[i];
      if (!p.d_out) continue;
      for (int64_t k0 = 0; k0 < std::max<int64_t>(q.context_dim, 1); k0 += TurnTile::kN) {
        launch("outer_turn", outer_turn_kernel<C, exact>, row_blocks, splits, 1, TurnTile::kThreads,
               OuterTurnProduct<C, exact>::kShared, q, p, dx_sums, partial, static_cast<int>(k0), static_cast<int>(step),
               started, ++piece == pieces, added);
        started = true;
      }
      added = true;
    }
    if (!contexts) return;
    group_rows(launch, q, SmallTile::kM);
    launch("outer_dcontext", outer_dcontext_kernel<C>, q.groups.limit, 1, 1, 128, 0, q, partial,
           static_cast<int>(splits));
  }

  void spread_outer(const Projection& p, int64_t columns, int64_t blocks_k) {
    if (q.context.wide) {
      launch("outer_spread", outer_spread_kernel<float, C>, columns, blocks_k, 1, SmallTile::kThreads,
             OuterSpreadProduct<float, C>::kShared, q, p);
    } else {
      launch("outer_spread", outer_spread_kernel<C, C>, columns, blocks_k, 1, SmallTile::kThreads,
             OuterSpreadProduct<C, C>::kShared, q, p);
    }
  }

  Launcher& launch;
  Problem& q;
  int64_t held = 0;
  void* at = nullptr;
};

template <class C, int planes, int exact>
void run(Launcher& launch, Problem& q, bool backward) {
  Modulated<C, planes, exact> modulated(launch, q);
  if (backward) {
    modulated.backward();
  } else {
    modulated.forward();
  }
}

enum Dtype { kFloat, kBfloat, kHalf };

thread_local std::string failure;

}  // namespace
}  // namespace ctxkern

#define CTXKERN_EXPORT extern "C" __attribute__((visibility("default")))

// What changes the layout of Problem or what is exported changes this.
CTXKERN_EXPORT int ctxkern_cuda_abi() { return 3; }
CTXKERN_EXPORT int ctxkern_cuda_emulated() {
#ifdef CTXKERN_EMULATE
  return 1;
#else
  return 0;
#endif
}
CTXKERN_EXPORT int64_t ctxkern_cuda_problem_bytes() { return sizeof(ctxkern::Problem); }

// Null where kernels can run on the device, or why not: its driver, or no code for it.
CTXKERN_EXPORT const char* ctxkern_cuda_unusable([[maybe_unused]] int device) {
  using namespace ctxkern;
#ifndef CTXKERN_EMULATE
  try {
    int before = 0;
    Launcher::check(cudaGetDevice(&before), "device");
    Launcher::check(cudaSetDevice(device), "device");
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, outer_sum_kernel<float>);
    Launcher::check(cudaSetDevice(before), "device");
    Launcher::check(status, "kernels");
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
#endif
  return nullptr;
}

// {rows, columns, group} of {d_in, d_out, context_dim, contexts, bytes of an element, workspace}.
CTXKERN_EXPORT void ctxkern_cuda_blocks(const int64_t* sizes, int backward, int64_t* cut) {
  using namespace ctxkern;
  const Blocks blocks = sizes[0] == 0 ? Blocks{0, sizes[1], sizes[3]}
                        : backward    ? backward_blocks(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5])
                                      : forward_blocks(sizes[0], sizes[1], sizes[3], sizes[4], sizes[5]);
  cut[0] = blocks.rows;
  cut[1] = blocks.columns;
  cut[2] = blocks.group;
}

// Returns null, or what went wrong. Without a workspace nothing is launched, and *bytes is what it must hold.
CTXKERN_EXPORT const char* ctxkern_cuda_modulated(const ctxkern::Problem* problem, int backward, [[maybe_unused]] int device,
                                                  void* workspace, int64_t* bytes, void* stream) {
  using namespace ctxkern;
  try {
    Problem q = *problem;
    Launcher launch(static_cast<char*>(workspace), static_cast<Stream>(stream));
#ifndef CTXKERN_EMULATE
    if (workspace) Launcher::check(cudaSetDevice(device), "device");
#endif
    bool wide = q.context.wide != 0;
    for (int i = 0; i < q.projections; ++i) wide = wide || q.projection[i].bilinear.wide;
    switch (q.dtype) {
      case kFloat:
        run<float, 1, 1>(launch, q, backward);
        break;
      case kBfloat:
        wide ? run<Bfloat, 2, 3>(launch, q, backward) : run<Bfloat, 1, 1>(launch, q, backward);
        break;
      case kHalf:
        wide ? run<Half, 2, 2>(launch, q, backward) : run<Half, 1, 1>(launch, q, backward);
        break;
      default:
        throw std::runtime_error("an unknown dtype");
    }
    *bytes = launch.bytes();
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}
