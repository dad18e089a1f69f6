// The driver of score_spans: which instruction set, which thread takes which rows.
#include "cpu/score_spans.h"

#include <algorithm>
#include <memory>

#include "cpu/parallel.h"
#include "cpu/score_spans_kernels.h"

namespace realm_kernels {
namespace {

const ScoreSpansKernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) {
    return score_spans_kernels_avx512();
  }
  if (isa == Isa::kAvx2) {
    return score_spans_kernels_avx2();
  }
#endif
  (void)isa;
  return score_spans_kernels_portable();
}

// A row is never split, so no bit depends on the number of threads.
void launch(const ScoreSpansParams& params, bool backward) {
  const ScoreSpansKernels& kernels = kernels_for(params.isa);
  parallel_for(params.rows, params.num_threads, [&](int64_t begin, int64_t end, int) {
    (backward ? kernels.backward : kernels.forward)(params, begin, end);
  });
}

}  // namespace

void launch_score_spans_fwd(const ScoreSpansParams& params) { launch(params, false); }

void launch_score_spans_bwd(ScoreSpansParams params) {
  if (params.d_weight == nullptr) {
    launch(params, true);
    return;
  }
  const auto scratch = std::make_unique<float[]>(params.rows * params.width);
  params.d_weight_of = scratch.get();
  launch(params, true);
  for (int64_t s = 0; s < params.width; ++s) {
    double sum = 0.0;
    for (int64_t n = 0; n < params.rows; ++n) sum += scratch[n * params.width + s];
    params.d_weight[s] = static_cast<float>(sum);
  }
}

}  // namespace realm_kernels
