namespace {
// Two doubles fill an SSE2 or NEON register.
constexpr int kLanes = 2;
}  // namespace

#include "cpu/marginal_loss_body.inl"

namespace realm_kernels {

const MarginalLossKernels& marginal_loss_kernels_portable() { return kKernels; }

}  // namespace realm_kernels
