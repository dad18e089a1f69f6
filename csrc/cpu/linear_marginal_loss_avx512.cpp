#if defined(__x86_64__)

namespace {
// Twenty-four accumulators, two vectors of a panel and a broadcast fill twenty-seven of thirty-two registers.
constexpr int kWidth = 16;
constexpr int kGroup = 12;
}  // namespace

#include "cpu/linear_marginal_loss_body.inl"

namespace realm_kernels {

const LinearMarginalLossKernels& linear_marginal_loss_kernels_avx512() { return kKernels; }

}  // namespace realm_kernels

#endif
