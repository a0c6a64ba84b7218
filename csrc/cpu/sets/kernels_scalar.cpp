#include "../lora/kernels.h"
#include "../modulated/kernels.h"

namespace ctxkern {

extern const Kernels f32_scalar;
const Kernels f32_scalar = kernels_of<F32>;

extern const LoraKernels lora_f32_scalar;
const LoraKernels lora_f32_scalar = lora_kernels_of<F32>;

}  // namespace ctxkern
