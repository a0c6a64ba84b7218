// What the kernels take by value: the problem, its rows by context, and a block of it.
#pragma once

#include "../../problem.h"
#include "../runtime/groups.h"

namespace ctxkern {

struct Call : Problem {
  Groups groups;
  int* slots;  // [N] row of the context table of each row of x, of the outer form; null: the row itself
};

// A block of D × E, and a group of contexts.
struct Block {
  int d_begin, d_size, e_begin, e_size, u_begin, u_size;
};

}  // namespace ctxkern
