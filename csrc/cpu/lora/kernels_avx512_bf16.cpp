#include "kernels.h"

namespace ctxkern {

extern const LoraKernels lora_bf16_avx512_bf16;
const LoraKernels lora_bf16_avx512_bf16 = lora_kernels_of<Bf16>;

}  // namespace ctxkern
