#include "kernels.h"

namespace ctxkern {

extern const Kernels f32_avx2;
const Kernels f32_avx2 = kernels_of<F32>;

}  // namespace ctxkern
