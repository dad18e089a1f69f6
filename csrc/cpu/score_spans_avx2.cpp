#if defined(__x86_64__)

namespace {
// Eight floats fill an AVX register.
constexpr int kLanes = 8;
}  // namespace

#include "cpu/score_spans_body.inl"

namespace realm_kernels {

const ScoreSpansKernels& score_spans_kernels_avx2() { return kKernels; }

}  // namespace realm_kernels

#endif
