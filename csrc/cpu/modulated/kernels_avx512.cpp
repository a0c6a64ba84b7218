#include "kernels.h"

namespace ctxkern {

extern const Kernels f32_avx512;
const Kernels f32_avx512 = kernels_of<F32>;

}  // namespace ctxkern
