namespace {
// Four floats fill an SSE or NEON register.
constexpr int kLanes = 4;
}  // namespace

#include "cpu/score_spans_body.inl"

namespace realm_kernels {

const ScoreSpansKernels& score_spans_kernels_portable() { return kKernels; }

}  // namespace realm_kernels
