#include "kernels.h"

namespace ctxkern {

extern const Kernels bf16_avx512_bf16;
const Kernels bf16_avx512_bf16 = kernels_of<Bf16>;

}  // namespace ctxkern
