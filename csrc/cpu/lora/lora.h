#pragma once

#include "../runtime/isa.h"
#include "call.h"

namespace ctxkern {

// The kernels of an instruction set for activations of a dtype: of words of bfloat16 where it has units for them.
const LoraKernels& lora_kernels_for(Isa isa, Dtype dtype);

}  // namespace ctxkern
