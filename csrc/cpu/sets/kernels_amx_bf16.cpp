// The words of the matrix unit come before the products that are made of them.
#include "../runtime/amx.h"

#include "../lora/kernels.h"
#include "../modulated/kernels.h"

namespace ctxkern {

extern const Kernels bf16_amx_bf16;
const Kernels bf16_amx_bf16 = kernels_of<Amx>;

extern const LoraKernels lora_bf16_amx_bf16;
const LoraKernels lora_bf16_amx_bf16 = lora_kernels_of<Amx>;

}  // namespace ctxkern
