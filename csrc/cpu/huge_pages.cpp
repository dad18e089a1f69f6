#include "cpu/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace realm_kernels {

void advise_huge_pages(uintptr_t address, int64_t bytes) {
  constexpr int64_t kLeastBytes = 4 << 20;
  if (bytes < kLeastBytes) {
    return;
  }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Whole pages only: what shares one with others is theirs too.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) {
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace realm_kernels
