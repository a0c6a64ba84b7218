// The Python module: each family binds its functions to it.
#pragma once

#include <pybind11/pybind11.h>

namespace ctxkern {

void bind_modulated(pybind11::module_& m);
void bind_lora(pybind11::module_& m);

}  // namespace ctxkern
