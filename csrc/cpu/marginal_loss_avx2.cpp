#if defined(__x86_64__)

namespace {
// Four doubles fill an AVX register.
constexpr int kLanes = 4;
}  // namespace

#include "cpu/marginal_loss_body.inl"

namespace realm_kernels {

const MarginalLossKernels& marginal_loss_kernels_avx2() { return kKernels; }

}  // namespace realm_kernels

#endif
