#include "../lora/kernels.h"
#include "../modulated/kernels.h"

namespace ctxkern {

extern const Kernels bf16_avx512_bf16;
const Kernels bf16_avx512_bf16 = kernels_of<Bf16>;

extern const LoraKernels lora_bf16_avx512_bf16;
const LoraKernels lora_bf16_avx512_bf16 = lora_kernels_of<Bf16>;

}  // namespace ctxkern
