#pragma once

#include <cstdint>

namespace ctxkern {

// Asks for huge pages where `bytes` of memory at p are large and not yet touched: what is written first by a kernel then
// costs one fault for 2 MiB and not 512. Does nothing where the system has none.
void advise_huge(void* p, int64_t bytes);

}  // namespace ctxkern
