// What torch may have on that sees or changes calls: its modes, asked as ctxkern/ops.py would, without Python's frames.
#pragma once

#include <pybind11/pybind11.h>

namespace ctxkern {

// Finds torch's functions; before those below.
void find_modes();

// Whether nothing sees or changes calls of plain tensors: tracer, transform, mode, profiler, autocast. Compilers see
// the functions of Python that ask.
bool ordinary();

bool grad_enabled();

// Whether torch.func has wrapped a tensor or batched it, that of an outer call included.
bool wrapped(pybind11::handle tensor);

}  // namespace ctxkern
