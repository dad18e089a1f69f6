// Subnormal numbers as IEEE 754 has them, whatever torch.set_flush_denormal() chose for the calling thread.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace realm_kernels {

class IeeeFloatMode {
 public:
  IeeeFloatMode(const IeeeFloatMode&) = delete;
  IeeeFloatMode& operator=(const IeeeFloatMode&) = delete;
#if defined(__SSE__)
  IeeeFloatMode() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~(kFlushToZero | kDenormalsAreZero)); }
  ~IeeeFloatMode() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned before_;
#else
  IeeeFloatMode() {}
  ~IeeeFloatMode() {}
#endif
};

}  // namespace realm_kernels
