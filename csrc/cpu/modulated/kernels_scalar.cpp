#include "kernels.h"

namespace ctxkern {

extern const Kernels f32_scalar;
const Kernels f32_scalar = kernels_of<F32>;

}  // namespace ctxkern
