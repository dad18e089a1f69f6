#if defined(__x86_64__)

namespace {
// Twenty-four accumulators, two row vectors and a broadcast fill twenty-seven of thirty-two registers.
constexpr int kWidth = 16;
constexpr int kQueryGroup = 12;
constexpr int kCodeGroup = 12;
}  // namespace

#include "cpu/mips_topk_body.inl"

namespace realm_kernels {

const MipsTopkKernels& mips_topk_kernels_avx512_bf16() { return kKernels; }

}  // namespace realm_kernels

#endif
