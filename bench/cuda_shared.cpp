// Bytes of shared memory and threads of every CUDA kernel that has some, a line each: bench/audit_cuda.py reads them.
#define CTXKERN_EMULATE 1
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <typeinfo>

#include "../csrc/cuda/lora/gradients.h"
#include "../csrc/cuda/modulated/outer.h"

using namespace ctxkern;

template <auto kernel>
struct Kernel {};

template <auto kernel>
void print(size_t bytes, int threads) {
  char* name = abi::__cxa_demangle(typeid(Kernel<kernel>).name(), nullptr, nullptr, nullptr);
  std::printf("%zu %d %s\n", bytes, threads, name);
  std::free(name);
}

// Of a kernel by its tile, that of its product.
template <auto kernel, class T, class P, class... More>
void print_of() {
  print<kernel>(std::max({P::kShared, More::kShared...}), T::kThreads);
}

template <class C, class T>
void print_rows() {
  print_of<&panel_y_kernel<C, T>, T, PanelYProduct<C, T>>();
  print_of<&panel_dx_kernel<C, T>, T, PanelDxProduct<C, T>>();
}

// P, C, planes and exact as in schedule.h.
template <class P, class C, int planes, int exact>
void print_parameters() {
  print_of<&panel_weights_kernel<P, C>, WeightsTile, PanelWeightsProduct<P, C>>();
  print_of<&panel_dbilinear_kernel<P, C, SmallTile, planes>, SmallTile,
           PanelDbilinearProduct<P, C, SmallTile, planes>>();
  print_of<&panel_dbilinear_kernel<P, C, NarrowTile, planes>, NarrowTile,
           PanelDbilinearProduct<P, C, NarrowTile, planes>>();
  print_of<&panel_dcontext_kernel<P, C, SmallTile, planes>, SmallTile, PanelDcontextProduct<P, C, SmallTile, planes>>();
  print_of<&panel_dcontext_kernel<P, C, LeastTile, planes>, LeastTile, PanelDcontextProduct<P, C, LeastTile, planes>>();
  print_of<&outer_dx_kernel<P, C, OuterDxTile, exact>, OuterDxTile, OuterDxProduct<P, C, OuterDxTile, exact>>();
  print_of<&outer_dx_kernel<P, C, NarrowOuterDxTile, exact>, NarrowOuterDxTile,
           OuterDxProduct<P, C, NarrowOuterDxTile, exact>>();
  print_of<&outer_weight_dx_kernel<P, C>, SmallTile, OuterWeightDxProduct<P, C>>();
  print<&outer_y_kernel<P, C, FewTile>>(kOuterShared<P, C, FewTile>, FewTile::kThreads);
  print<&outer_y_kernel<P, C, WeightsTile>>(kOuterShared<P, C, WeightsTile>, WeightsTile::kThreads);
  print<&outer_y_kernel<P, C, SmallTile>>(kOuterShared<P, C, SmallTile>, SmallTile::kThreads);
}

template <class C, class T>
void print_panel_g() {
  print_of<&panel_g_kernel<C, T>, T, PanelGProduct<C, T>>();
}

template <class P, class C>
void print_outer_dbilinear() {
  print_of<&outer_dbilinear_kernel<P, C, SmallTile>, SmallTile, OuterDbilinearProduct<P, C, SmallTile>>();
  print_of<&outer_dbilinear_kernel<P, C, NarrowTile>, NarrowTile, OuterDbilinearProduct<P, C, NarrowTile>>();
}

template <class C>
void print_dtype() {
  print_rows<C, SmallTile>();
  print_panel_g<C, SmallTile>();
  print_parameters<C, C, 1, 1>();
  print_outer_dbilinear<C, C>();
  print_of<&outer_dweight_kernel<C>, SmallTile, OuterDweightProduct<C>>();
  print<&panel_dcontext_sum_kernel<C>>(kSumShared, kSumThreads);
  print<&outer_dcontext_sum_kernel<C>>(kSumShared, kSumThreads);
}

// P and exact: of products with float32 parameters.
template <class C, class P, int exact>
void print_half() {
  print_dtype<C>();
  print_rows<C, HighTile>();
  print_rows<C, LargeTile>();
  print_panel_g<C, WideTile>();
  print_panel_g<C, LargeTile>();
  print_parameters<P, C, 2, exact>();
  print_outer_dbilinear<float, C>();
}

// Of the most ranks that a kernel holds.
template <class C, class P, class S, class T>
void print_ranks(int64_t ranks) {
  print<&lora_y_kernel<C, P, S, T>>(kUpdateStaged<C, P, S, T> + held_bytes<S>(ranks), T::kThreads);
  print<&lora_dx_kernel<C, P, S, T>>(kDxStaged<C, P, S, T> + held_bytes<S>(ranks), T::kThreads);
}

// C, P and S as in lora/kernels.h.
template <class C, class P, class S>
void print_lora() {
  print_ranks<C, P, S, RankTile>(kMostHeld);
  print_ranks<C, P, S, FewRanksTile>(FewRanksTile::kN);
}

template <class C, class S, class T>
void print_gradients() {
  print_of<&lora_dab_kernel<C, S, T>, T, GradientsProduct<S, C, T>>();
}

template <class C, class S>
void print_lora_dab() {
  print_gradients<C, S, GradientTile>();
  print_gradients<C, S, FewRanksGradientTile>();
}

int main() {
  print_lora<float, float, float>();
  print_lora<Bfloat, Bfloat, Bfloat>();
  print_lora<Half, Half, float>();
  print_lora<Half, float, float>();
  print_lora_dab<float, float>();
  print_lora_dab<Bfloat, Bfloat>();
  print_lora_dab<Half, float>();
  print_dtype<float>();
  print_half<Bfloat, Bfloat, 3>();
  print_half<Half, float, 2>();
  print<&number_kernel>(kNumberShared, kGroupThreads);
}
