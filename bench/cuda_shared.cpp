// Bytes of shared memory of every CUDA kernel that has some, a line each: bench/audit_cuda.py reads them.
#define CTXKERN_EMULATE 1
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <typeinfo>

#include "../csrc/cuda/outer.h"

using namespace ctxkern;

template <auto kernel>
struct Kernel {};

template <auto kernel>
void print(size_t bytes) {
  char* name = abi::__cxa_demangle(typeid(Kernel<kernel>).name(), nullptr, nullptr, nullptr);
  std::printf("%zu %s\n", bytes, name);
  std::free(name);
}

template <class C, class T>
void print_tiled() {
  print<&project_kernel<C, T>>(ProjectProduct<C, T>::kShared);
  print<&gather_kernel<C, T>>(GatherProduct<C, T>::kShared);
  print<&turn_kernel<C, T>>(TurnProduct<C, T>::kShared);
}

template <class C, int planes, int exact>
void print_planes() {
  print<&spread_kernel<C, planes>>(SpreadProduct<C, planes>::kShared);
  print<&dcontext_kernel<C, planes>>(ContextProduct<C, planes>::kShared);
  print<&outer_turn_kernel<C, exact>>(OuterTurnProduct<C, exact>::kShared);
}

template <class C>
void print_dtype() {
  print<&make_kernel<C>>(MakeProduct<C>::kShared);
  print_tiled<C, SmallTile>();
  print_planes<C, 1, 1>();
  print<&outer_forward_kernel<C>>(std::max(OuterProduct<C>::kShared, WeightProduct<C>::kShared));
  print<&outer_spread_kernel<C, C>>(OuterSpreadProduct<C, C>::kShared);
  print<&dweight_kernel<C>>(GradientProduct<C>::kShared);
  print<&weight_turn_kernel<C>>(TransposedProduct<C>::kShared);
}

template <class C, int exact>
void print_half() {
  print_dtype<C>();
  print_tiled<C, LargeTile>();
  print_planes<C, 2, exact>();
  print<&outer_spread_kernel<float, C>>(OuterSpreadProduct<float, C>::kShared);
}

int main() {
  print_dtype<float>();
  print_half<Bfloat, 3>();
  print_half<Half, 2>();
  print<&number_kernel>(kNumberShared);
}
