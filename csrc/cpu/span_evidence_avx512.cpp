#if defined(__x86_64__)

namespace {
// Eight doubles fill an AVX-512 register.
constexpr int kLanes = 8;
}  // namespace

#include "cpu/span_evidence_body.inl"

namespace realm_kernels {

const SpanEvidenceKernels& span_evidence_kernels_avx512() { return kKernels; }

}  // namespace realm_kernels

#endif
