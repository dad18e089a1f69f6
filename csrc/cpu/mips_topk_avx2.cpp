#if defined(__x86_64__)

namespace {
// Twelve accumulators, two row vectors and a broadcast fill fifteen of sixteen registers.
constexpr int kWidth = 8;
constexpr int kQueryGroup = 6;
constexpr int kCodeGroup = 4;
}  // namespace

#include "cpu/mips_topk_body.inl"

namespace realm_kernels {

const MipsTopkKernels& mips_topk_kernels_avx2() { return kKernels; }

}  // namespace realm_kernels

#endif
