// The driver of span_marginal_loss: which instruction set, which thread takes which rows.
#include "cpu/span_evidence.h"

#include <algorithm>
#include <limits>
#include <memory>

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

void write_loss(const SpanEvidenceParams& params, int64_t b, double value) {
  if (params.wide) {
    static_cast<double*>(params.loss)[b] = value;
  } else {
    static_cast<float*>(params.loss)[b] = static_cast<float>(value);
  }
}

}  // namespace

int64_t launch_span_marginal_loss_fwd(SpanEvidenceParams params) {
  const int64_t batch = params.rows / params.documents;
  const auto scratch = std::make_unique<double[]>(2 * params.rows + batch);
  const auto has_correct = std::make_unique<bool[]>(params.rows);
  const auto possible = std::make_unique<int64_t[]>(batch);
  params.log_likelihood = scratch.get();
  params.relevance = scratch.get() + params.rows;
  params.has_correct = has_correct.get();
  launch(params, false);

  double* const loss = scratch.get() + 2 * params.rows;
  MarginalLossParams marginal{};
  marginal.scores = {params.relevance, FloatType::kFloat64};
  marginal.log_likelihood = {params.log_likelihood, FloatType::kFloat64};
  marginal.batch = batch;
  marginal.documents = marginal.stride_b = params.documents;
  marginal.tokens = marginal.stride_k = marginal.stride_m = 1;
  marginal.wide = true;
  marginal.reduction = Reduction::kNone;
  marginal.loss = loss;
  marginal.count = possible.get();
  marginal.kept_residual = params.residual;
  marginal.kept_posterior = params.posterior;
  marginal.num_threads = params.num_threads;
  marginal.isa = params.isa;
  launch_marginal_loss_fwd(marginal);

  int64_t counted = 0;
  double total = 0.0;
  for (int64_t b = 0; b < batch; ++b) {
    const bool* const found = params.has_correct + b * params.documents;
    const bool counts = std::any_of(found, found + params.documents, [](bool is) { return is; });
    // A correct span where every valid span scores -inf is impossible, like any answer of likelihood zero.
    const double impossible = std::numeric_limits<double>::infinity();
    const double value = !counts ? 0.0 : possible[b] != 0 ? loss[b] : impossible;
    counted += counts ? 1 : 0;
    total += value;
    if (params.reduction == Reduction::kNone) {
      write_loss(params, b, value);
      params.count[b] = counts ? 1 : 0;
    }
  }
  if (params.reduction != Reduction::kNone) {
    const bool mean = params.reduction == Reduction::kMean;
    write_loss(params, 0, mean ? total / static_cast<double>(std::max<int64_t>(1, counted)) : total);
  }
  return counted;
}

void launch_span_marginal_loss_bwd(const SpanEvidenceParams& params) { launch(params, true); }

}  // namespace realm_kernels
