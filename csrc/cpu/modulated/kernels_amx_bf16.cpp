#include "../runtime/amx.h"

#include "kernels.h"

namespace ctxkern {

extern const Kernels bf16_amx_bf16;
const Kernels bf16_amx_bf16 = kernels_of<Amx>;

}  // namespace ctxkern
