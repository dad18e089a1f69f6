// The driver of span_evidence: which instruction set, which thread takes which rows.
#include "cpu/span_evidence.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/span_evidence_kernels.h"

namespace realm_kernels {
namespace {

// Spans a thread should have at least: below that, waking it costs what it saves.
constexpr int64_t kGrain = 1 << 13;

const SpanEvidenceKernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) {
    return span_evidence_kernels_avx512();
  }
  if (isa == Isa::kAvx2) {
    return span_evidence_kernels_avx2();
  }
#endif
  (void)isa;
  return span_evidence_kernels_portable();
}

// A row is never split, so no bit depends on the number of threads.
void launch(const SpanEvidenceParams& params, bool backward) {
  const SpanEvidenceKernels& kernels = kernels_for(params.isa);
  const int64_t useful = 1 + params.rows * params.spans / kGrain;
  const int num_threads = static_cast<int>(std::min<int64_t>(params.num_threads, useful));
  parallel_for(params.rows, num_threads, [&](int64_t begin, int64_t end, int) {
    (backward ? kernels.backward : kernels.forward)(params, begin, end);
  });
}

}  // namespace

void launch_span_evidence_fwd(const SpanEvidenceParams& params) { launch(params, false); }

void launch_span_evidence_bwd(const SpanEvidenceParams& params) { launch(params, true); }

}  // namespace realm_kernels
