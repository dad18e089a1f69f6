#if defined(__x86_64__)

namespace {
// Sixteen floats fill an AVX-512 register.
constexpr int kLanes = 16;
}  // namespace

#include "cpu/score_spans_body.inl"

namespace realm_kernels {

const ScoreSpansKernels& score_spans_kernels_avx512() { return kKernels; }

}  // namespace realm_kernels

#endif
