#if defined(__x86_64__)

namespace {
// Twelve accumulators, two vectors of a panel and a broadcast fill fifteen of sixteen registers.
constexpr int kWidth = 8;
constexpr int kGroup = 6;
}  // namespace

#include "cpu/linear_marginal_loss_body.inl"

namespace realm_kernels {

const LinearMarginalLossKernels& linear_marginal_loss_kernels_avx2() { return kKernels; }

}  // namespace realm_kernels

#endif
