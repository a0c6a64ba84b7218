// The entry points over one kind of words, for a file that is compiled for one instruction set.
#pragma once

#include "outer_backward.h"
#include "panel_backward.h"

namespace ctxkern {
namespace {

// Whether parameters are wider than x. They are rounded as they are read, but not for their own gradients: those are wide
// too, and an error of one more rounding would show.
inline bool mixed(const Call& q) {
  bool wide = q.context.dtype != q.x.dtype;
  for (int i = 0; i < q.projections; ++i) wide = wide || q.projection[i].bilinear.dtype != q.x.dtype;
  return wide;
}

template <class W>
Tiles tiles_of(const Call& q, bool backward) {
  if (!backward) return q.outer ? OuterForward<W>::tiles(q) : PanelForward<W>::tiles(q);
  if (W::PER == 2 && mixed(q)) return q.outer ? OuterBackward<F32>::tiles(q) : PanelBackward<F32, W>::tiles(q);
  return q.outer ? OuterBackward<W>::tiles(q) : PanelBackward<W, W>::tiles(q);
}

template <class W>
void forward(const Call& q, const Tiles& tiles, char* workspace) {
  if (q.outer) return OuterForward<W>(q, tiles, workspace).run();
  PanelForward<W>(q, tiles, workspace).run();
}

template <class W>
void backward(const Call& q, const Tiles& tiles, char* workspace) {
  if (W::PER == 2 && mixed(q)) {
    if (q.outer) return OuterBackward<F32>(q, tiles, workspace).run();
    return PanelBackward<F32, W>(q, tiles, workspace).run();
  }
  if (q.outer) return OuterBackward<W>(q, tiles, workspace).run();
  PanelBackward<W, W>(q, tiles, workspace).run();
}

template <class W>
constexpr Kernels kernels_of{&tiles_of<W>, &forward<W>, &backward<W>};

}  // namespace
}  // namespace ctxkern
