namespace {
// Two doubles fill an SSE2 or NEON register.
constexpr int kLanes = 2;
}  // namespace

#include "cpu/span_evidence_body.inl"

namespace realm_kernels {

const SpanEvidenceKernels& span_evidence_kernels_portable() { return kKernels; }

}  // namespace realm_kernels
