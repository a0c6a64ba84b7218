#include "modulated.h"

namespace ctxkern {

extern const Kernels f32_scalar;
#ifdef CTXKERN_HAVE_AVX2
extern const Kernels f32_avx2;
#endif
#ifdef CTXKERN_HAVE_AVX512
extern const Kernels f32_avx512;
#endif
#ifdef CTXKERN_HAVE_AVX512_BF16
extern const Kernels bf16_avx512_bf16;
#endif
#ifdef CTXKERN_HAVE_AMX_BF16
extern const Kernels bf16_amx_bf16;
#endif

const Kernels& kernels_for(Isa isa, Dtype dtype) {
#ifdef CTXKERN_HAVE_AMX_BF16
  if (isa >= Isa::amx_bf16 && dtype == Dtype::bf16) return bf16_amx_bf16;
#endif
#ifdef CTXKERN_HAVE_AVX512_BF16
  if (isa >= Isa::avx512_bf16 && dtype == Dtype::bf16) return bf16_avx512_bf16;
#endif
#ifdef CTXKERN_HAVE_AVX512
  if (isa >= Isa::avx512) return f32_avx512;
#endif
#ifdef CTXKERN_HAVE_AVX2
  if (isa >= Isa::avx2) return f32_avx2;
#endif
  return f32_scalar;
}

}  // namespace ctxkern
