#include "../runtime/amx.h"

#include "kernels.h"

namespace ctxkern {

extern const LoraKernels lora_bf16_amx_bf16;
const LoraKernels lora_bf16_amx_bf16 = lora_kernels_of<Amx>;

}  // namespace ctxkern
