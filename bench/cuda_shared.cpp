// Bytes of shared memory and threads of every CUDA kernel that has some, a line each: bench/audit_cuda.py reads them.
#define CTXKERN_EMULATE 1
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <typeinfo>

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
  print_of<&project_kernel<C, T>, T, ProjectProduct<C, T>>();
  print_of<&turn_kernel<C, T>, T, TurnProduct<C, T>>();
}

// P, C, planes and exact as in schedule.h.
template <class P, class C, int planes, int exact>
void print_parameters() {
  print_of<&make_kernel<P, C>, MakeTile, MakeProduct<P, C>>();
  print_of<&spread_kernel<P, C, SmallTile, planes>, SmallTile, SpreadProduct<P, C, SmallTile, planes>>();
  print_of<&spread_kernel<P, C, NarrowTile, planes>, NarrowTile, SpreadProduct<P, C, NarrowTile, planes>>();
  print_of<&dcontext_kernel<P, C, SmallTile, planes>, SmallTile, ContextProduct<P, C, SmallTile, planes>>();
  print_of<&dcontext_kernel<P, C, LeastTile, planes>, LeastTile, ContextProduct<P, C, LeastTile, planes>>();
  print_of<&outer_turn_kernel<P, C, TurnTile, exact>, TurnTile, OuterTurnProduct<P, C, TurnTile, exact>>();
  print_of<&outer_turn_kernel<P, C, NarrowTurnTile, exact>, NarrowTurnTile,
           OuterTurnProduct<P, C, NarrowTurnTile, exact>>();
  print_of<&weight_turn_kernel<P, C>, SmallTile, TransposedProduct<P, C>>();
  print<&outer_forward_kernel<P, C, FewTile>>(kOuterShared<P, C, FewTile>, FewTile::kThreads);
  print<&outer_forward_kernel<P, C, MakeTile>>(kOuterShared<P, C, MakeTile>, MakeTile::kThreads);
  print<&outer_forward_kernel<P, C, SmallTile>>(kOuterShared<P, C, SmallTile>, SmallTile::kThreads);
}

template <class C, class T>
void print_gather() {
  print_of<&gather_kernel<C, T>, T, GatherProduct<C, T>>();
}

template <class P, class C>
void print_spread() {
  print_of<&outer_spread_kernel<P, C, SmallTile>, SmallTile, OuterSpreadProduct<P, C, SmallTile>>();
  print_of<&outer_spread_kernel<P, C, NarrowTile>, NarrowTile, OuterSpreadProduct<P, C, NarrowTile>>();
}

template <class C>
void print_dtype() {
  print_rows<C, SmallTile>();
  print_gather<C, SmallTile>();
  print_parameters<C, C, 1, 1>();
  print_spread<C, C>();
  print_of<&dweight_kernel<C>, SmallTile, GradientProduct<C>>();
  print<&sum_partials_kernel<C>>(kSumShared, kSumThreads);
  print<&outer_dcontext_kernel<C>>(kSumShared, kSumThreads);
}

// P and exact: of products with float32 parameters.
template <class C, class P, int exact>
void print_half() {
  print_dtype<C>();
  print_rows<C, HighTile>();
  print_rows<C, LargeTile>();
  print_gather<C, WideTile>();
  print_gather<C, LargeTile>();
  print_parameters<P, C, 2, exact>();
  print_spread<float, C>();
}

int main() {
  print_dtype<float>();
  print_half<Bfloat, Bfloat, 3>();
  print_half<Half, float, 2>();
  print<&number_kernel>(kNumberShared, kGroupThreads);
}
