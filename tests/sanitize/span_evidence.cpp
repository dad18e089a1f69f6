// span_marginal_loss, forward and backward, against the formulas written out: both normalizations, documents
// that are not there, examples without a correct span, NaN behind masks.
#include "cpu/span_evidence.h"

#include <algorithm>

#include "cases.h"

namespace sanitize {
namespace {

using realm_kernels::Reduction;
using realm_kernels::SpanEvidenceParams;

struct Shape {
  int64_t batch, documents, spans;
};
constexpr Shape kShapes[] = {{0, 3, 4},  {1, 1, 1}, {9, 1, 1},  {2, 150, 1}, {5, 1, 3},
                             {4, 70, 2}, {7, 3, 8}, {8, 5, 17}, {60, 5, 63}};
constexpr FloatType kTypes[] = {FloatType::kFloat64, FloatType::kFloat32, FloatType::kBFloat16,
                                FloatType::kFloat16};

struct Problem {
  Problem(const Shape& shape, FloatType type, bool masked, uint64_t seed)
      : shape(shape),
        masked(masked),
        wide(type == FloatType::kFloat64),
        scores(score_type(), rows()),
        log_weight(score_type(), rows()),
        span_scores(type, rows() * shape.spans),
        correct(0, false),
        valid(0, false),
        doc_mask(0, false) {
    Random random(seed);
    correct = draw_mask(random, rows() * shape.spans, 0.3);
    valid = draw_mask(random, rows() * shape.spans, masked ? 0.7 : 2.0);
    doc_mask = draw_mask(random, rows(), masked ? 0.8 : 2.0);
    for (int64_t r = 0; r < rows(); ++r) {
      scores.set(r, doc_mask[r] ? random.uniform(-2, 2) : kNan);
      log_weight.set(r, masked ? random.uniform(-1, 0) : 0.0);
      for (int64_t i = r * shape.spans; i < (r + 1) * shape.spans; ++i) {
        span_scores.set(i, doc_mask[r] && valid[i] ? random.uniform(-3, 3) : kNan);
      }
    }
  }

  int64_t rows() const { return shape.batch * shape.documents; }
  FloatType score_type() const { return wide ? FloatType::kFloat64 : FloatType::kFloat32; }

  Shape shape;
  bool masked, wide;
  Elements scores, log_weight, span_scores;
  Mask correct, valid, doc_mask;
};

struct Expected {
  std::vector<double> loss, d_scores, d_span_scores;  // [B], [B, K], [B, K, C]; of one example's own loss
  std::vector<int64_t> count;                         // [B]
};

double share(double part, double whole) { return part == 0.0 ? 0.0 : part / whole; }

Expected expected(const Problem& problem, bool is_global) {
  const auto [batch, documents, spans] = problem.shape;
  Expected result;
  result.loss.assign(batch, 0.0);
  result.count.assign(batch, 0);
  result.d_scores.assign(problem.rows(), 0.0);
  result.d_span_scores.assign(problem.rows() * spans, 0.0);
  // Of each document: sums of exp(score) over spans, and what it weighs in the denominator and the numerator.
  std::vector<double> of_valid(documents), of_correct(documents), all(documents), right(documents);
  for (int64_t b = 0; b < batch; ++b) {
    double total = 0.0, total_right = 0.0;
    for (int64_t k = 0; k < documents; ++k) {
      const int64_t r = b * documents + k;
      of_valid[k] = of_correct[k] = 0.0;
      for (int64_t i = r * spans; i < (r + 1) * spans; ++i) {
        const double e = problem.doc_mask[r] && problem.valid[i] ? std::exp(problem.span_scores.get(i)) : 0.0;
        of_valid[k] += e;
        of_correct[k] += problem.correct[i] ? e : 0.0;
      }
      const double prior =
          problem.doc_mask[r] ? std::exp(problem.scores.get(r) + problem.log_weight.get(r)) : 0.0;
      all[k] = is_global ? prior * of_valid[k] : prior;
      right[k] = all[k] * share(of_correct[k], of_valid[k]);
      total += all[k];
      total_right += right[k];
    }
    if (total_right == 0.0) {
      continue;
    }
    result.count[b] = 1;
    result.loss[b] = std::log(total) - std::log(total_right);
    for (int64_t k = 0; k < documents; ++k) {
      const int64_t r = b * documents + k;
      const double posterior = right[k] / total_right, prior = all[k] / total;
      result.d_scores[r] = prior - posterior;
      for (int64_t i = r * spans; i < (r + 1) * spans; ++i) {
        if (problem.doc_mask[r] && problem.valid[i]) {
          const double e = std::exp(problem.span_scores.get(i));
          const double in_correct = problem.correct[i] ? share(e, of_correct[k]) : 0.0;
          result.d_span_scores[i] =
              (is_global ? prior : posterior) * share(e, of_valid[k]) - posterior * in_correct;
        }
      }
    }
  }
  return result;
}

void run(const Problem& problem, bool is_global, Reduction reduction, int num_threads,
         const std::string& isa) {
  const auto [batch, documents, spans] = problem.shape;
  const FloatType type = problem.span_scores.type(), result_type = problem.score_type();
  const int64_t rows = problem.rows();
  const bool none = reduction == Reduction::kNone;
  const std::string where = "span_marginal_loss " + isa + " " + name_of(type) +
                            " B=" + std::to_string(batch) + " K=" + std::to_string(documents) +
                            " C=" + std::to_string(spans) + (is_global ? " global" : " document") +
                            (none ? " none" : " mean") + " threads=" + std::to_string(num_threads);
  Elements loss(result_type, none ? batch : 1), d_loss(result_type, none ? batch : 1);
  Elements d_scores(result_type, rows), d_span_scores(type, rows * spans);
  Elements kept(FloatType::kFloat64, 4 * rows);
  std::vector<int64_t> count(batch, -7);
  for (int64_t i = 0; i < d_loss.count(); ++i) {
    d_loss.set(i, 0.5 + static_cast<double>(i % 3));
  }
  SpanEvidenceParams params{};
  params.scores = {problem.scores.data(), result_type};
  params.log_weight = {problem.masked ? problem.log_weight.data() : nullptr, result_type};
  params.doc_mask = problem.masked ? problem.doc_mask.data() : nullptr;
  params.span_scores = {problem.span_scores.data(), type};
  params.correct = problem.correct.data();
  params.valid = problem.masked ? problem.valid.data() : nullptr;
  params.documents = documents;
  params.rows = rows;
  params.spans = spans;
  params.is_global = is_global;
  params.wide = problem.wide;
  params.reduction = reduction;
  params.right = static_cast<double*>(kept.data());
  params.wrong = params.right + rows;
  params.posterior = params.wrong + rows;
  params.residual = params.posterior + rows;
  params.loss = loss.data();
  params.count = none ? count.data() : nullptr;
  params.num_threads = num_threads;
  params.isa = realm_kernels::choose_isa(isa);
  const int64_t counted = launch_span_marginal_loss_fwd(params);
  params.d_loss = d_loss.data();
  params.divisor = none ? 1.0 : static_cast<double>(std::max<int64_t>(1, counted));
  params.d_scores = d_scores.data();
  params.d_span_scores = d_span_scores.data();
  launch_span_marginal_loss_bwd(params);

  const Expected wanted = expected(problem, is_global);
  int64_t total = 0;
  double sum = 0.0;
  for (int64_t b = 0; b < batch; ++b) {
    total += wanted.count[b];
    sum += wanted.loss[b];
    if (none) {
      expect_close(where + " loss", b, loss.get(b), wanted.loss[b], 16.0, result_type);
    }
  }
  if (counted != total || (none && count != wanted.count)) {
    fail(where + " count", 0, static_cast<double>(counted), static_cast<double>(total));
  }
  if (!none) {
    const double mean = sum / static_cast<double>(std::max<int64_t>(1, total));
    expect_close(where + " loss", 0, loss.get(0), mean, sum, result_type);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const double g = d_loss.get(none ? r / documents : 0) / params.divisor;
    expect_close(where + " d_scores", r, d_scores.get(r), g * wanted.d_scores[r], 4.0, result_type);
    for (int64_t i = r * spans; i < (r + 1) * spans; ++i) {
      expect_close(where + " d_span_scores", i, d_span_scores.get(i), g * wanted.d_span_scores[i], 4.0, type);
    }
  }
}

}  // namespace

int64_t run_span_evidence() {
  int64_t calls = 0;
  for (const Shape& shape : kShapes) {
    for (const FloatType type : kTypes) {
      if (kThreadsOnly && type != FloatType::kFloat32) {
        continue;
      }
      for (const bool masked : {false, true}) {
        const Problem problem(shape, type, masked, static_cast<uint64_t>(calls));
        for (const std::string& isa : realm_kernels::instruction_sets()) {
          for (const bool is_global : {false, true}) {
            run(problem, is_global, masked ? Reduction::kNone : Reduction::kMean, 3, isa);
            ++calls;
          }
        }
      }
    }
  }
  return calls;
}

}  // namespace sanitize
