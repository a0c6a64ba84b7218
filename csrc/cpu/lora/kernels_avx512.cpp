#include "kernels.h"

namespace ctxkern {

extern const LoraKernels lora_f32_avx512;
const LoraKernels lora_f32_avx512 = lora_kernels_of<F32>;

}  // namespace ctxkern
