#include "kernels.h"

namespace ctxkern {

extern const LoraKernels lora_f32_scalar;
const LoraKernels lora_f32_scalar = lora_kernels_of<F32>;

}  // namespace ctxkern
