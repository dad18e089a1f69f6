namespace {
// As for AVX2: SSE2 and NEON have sixteen registers at least.
constexpr int kWidth = 4;
constexpr int kGroup = 6;
}  // namespace

#include "cpu/linear_marginal_loss_body.inl"

namespace realm_kernels {

const LinearMarginalLossKernels& linear_marginal_loss_kernels_portable() { return kKernels; }

}  // namespace realm_kernels
