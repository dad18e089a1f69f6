// Large results are fresh memory at every call, and the kernel hands it out page by page: of 94 MB in pages
// of 4 KiB that takes five times as long as writing it. Asked for, it comes in pages of 2 MiB.
#pragma once

#include <cstdint>

namespace realm_kernels {

// A wish about memory that holds nothing yet; where it cannot be granted nothing happens, nor for less than
// 4 MiB: two huge pages at least, less is not worth the call.
void advise_huge_pages(uintptr_t address, int64_t bytes);

}  // namespace realm_kernels
