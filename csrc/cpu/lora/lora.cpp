#include "lora.h"

namespace ctxkern {

extern const LoraKernels lora_f32_scalar;
#ifdef CTXKERN_HAVE_AVX2
extern const LoraKernels lora_f32_avx2;
#endif
#ifdef CTXKERN_HAVE_AVX512
extern const LoraKernels lora_f32_avx512;
#endif
#ifdef CTXKERN_HAVE_AVX512_BF16
extern const LoraKernels lora_bf16_avx512_bf16;
#endif
#ifdef CTXKERN_HAVE_AMX_BF16
extern const LoraKernels lora_bf16_amx_bf16;
#endif

const LoraKernels& lora_kernels_for(Isa isa, Dtype dtype) {
#ifdef CTXKERN_HAVE_AMX_BF16
  if (isa >= Isa::amx_bf16 && dtype == Dtype::bf16) return lora_bf16_amx_bf16;
#endif
#ifdef CTXKERN_HAVE_AVX512_BF16
  if (isa >= Isa::avx512_bf16 && dtype == Dtype::bf16) return lora_bf16_avx512_bf16;
#endif
#ifdef CTXKERN_HAVE_AVX512
  if (isa >= Isa::avx512) return lora_f32_avx512;
#endif
#ifdef CTXKERN_HAVE_AVX2
  if (isa >= Isa::avx2) return lora_f32_avx2;
#endif
  return lora_f32_scalar;
}

}  // namespace ctxkern
