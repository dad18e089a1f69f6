#if defined(__x86_64__)

namespace {
// Four doubles fill an AVX register.
constexpr int kLanes = 4;
}  // namespace

#include "cpu/span_evidence_body.inl"

namespace realm_kernels {

const SpanEvidenceKernels& span_evidence_kernels_avx2() { return kKernels; }

}  // namespace realm_kernels

#endif
