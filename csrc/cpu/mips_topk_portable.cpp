namespace {
// Four lanes fill an SSE or NEON register; twelve accumulators leave room among sixteen registers.
constexpr int kWidth = 4;
constexpr int kQueryGroup = 6;
constexpr int kCodeGroup = 4;
}  // namespace

#include "cpu/mips_topk_body.inl"

namespace realm_kernels {

const MipsTopkKernels& mips_topk_kernels_portable() { return kKernels; }

}  // namespace realm_kernels
