#include "../lora/kernels.h"
#include "../modulated/kernels.h"

namespace ctxkern {

extern const Kernels f32_avx2;
const Kernels f32_avx2 = kernels_of<F32>;

extern const LoraKernels lora_f32_avx2;
const LoraKernels lora_f32_avx2 = lora_kernels_of<F32>;

}  // namespace ctxkern
