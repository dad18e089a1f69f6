// span_evidence, forward and backward, against the formulas written out.
#include "cpu/span_evidence.h"

#include <algorithm>

#include "cases.h"

namespace sanitize {
namespace {

using realm_kernels::SpanEvidenceParams;

struct Shape {
  int64_t rows, spans;
};
constexpr Shape kShapes[] = {{0, 4}, {1, 1}, {9, 1}, {5, 3}, {7, 8}, {40, 17}, {300, 63}};
constexpr FloatType kTypes[] = {FloatType::kFloat64, FloatType::kFloat32, FloatType::kBFloat16,
                                FloatType::kFloat16};

void run(const Shape& shape, FloatType type, bool all_valid, const std::string& isa, uint64_t seed) {
  const auto [rows, spans] = shape;
  const std::string where = "span_evidence " + isa + " " + name_of(type) + " R=" + std::to_string(rows) +
                            " C=" + std::to_string(spans);
  Random random(seed);
  const Mask correct = draw_mask(random, rows * spans, 0.3);
  const Mask valid = draw_mask(random, rows * spans, all_valid ? 2.0 : 0.7);
  const Mask is_document = draw_mask(random, rows, 0.8);
  Elements scores(type, rows * spans), d_scores(type, rows * spans);
  for (int64_t i = 0; i < rows * spans; ++i) {
    scores.set(i, valid[i] && is_document[i / spans] ? random.uniform(-3, 3) : kNan);
  }
  const auto wide = [&](int64_t count) { return Elements(FloatType::kFloat64, count); };
  Elements kept = wide(4 * rows), relevance = wide(rows), loss = wide(rows), d_relevance = wide(rows);
  std::vector<int64_t> count(rows);
  for (int64_t r = 0; r < rows; ++r) {
    relevance.set(r, is_document[r] ? random.uniform(-1, 1) : kNan);
    loss.set(r, -1.0);
  }
  double* const right = static_cast<double*>(kept.data());
  // One document an example: its posterior is 1 where a correct span is found, and r is 0.
  SpanEvidenceParams params{};
  params.scores = {relevance.data(), FloatType::kFloat64};
  params.doc_mask = is_document.data();
  params.span_scores = {scores.data(), type};
  params.correct = correct.data();
  params.valid = all_valid ? nullptr : valid.data();
  params.documents = 1;
  params.rows = rows;
  params.spans = spans;
  params.is_global = all_valid;
  params.wide = true;
  params.reduction = realm_kernels::Reduction::kNone;
  params.right = right;
  params.wrong = right + rows;
  params.posterior = right + 2 * rows;
  params.residual = right + 3 * rows;
  params.loss = loss.data();
  params.count = count.data();
  params.divisor = 1.0;
  params.num_threads = 3;
  params.isa = realm_kernels::choose_isa(isa);
  launch_span_marginal_loss_fwd(params);
  Elements d_loss = wide(rows);
  for (int64_t r = 0; r < rows; ++r) d_loss.set(r, random.uniform(-1, 1));
  params.d_loss = d_loss.data();
  params.d_scores = d_relevance.data();
  params.d_span_scores = d_scores.data();
  launch_span_marginal_loss_bwd(params);

  for (int64_t r = 0; r < rows; ++r) {
    double sum_right = 0.0, sum_valid = 0.0;
    for (int64_t i = r * spans; i < (r + 1) * spans; ++i) {
      const double e = is_document[r] && valid[i] ? std::exp(scores.get(i)) : 0.0;
      sum_valid += e;
      sum_right += correct[i] ? e : 0.0;
    }
    const bool found = sum_right > 0.0;
    const double wanted_loss = found ? std::log(sum_valid) - std::log(sum_right) : 0.0;
    expect_close(where + " loss", r, loss.get(r), wanted_loss, 8.0, FloatType::kFloat64);
    expect_close(where + " d_scores", r, d_relevance.get(r), 0.0, 1.0, FloatType::kFloat64);
    if (count[r] != (found ? 1 : 0)) {
      fail(where + " count", r, count[r], found);
    }
    for (int64_t i = r * spans; i < (r + 1) * spans; ++i) {
      const bool counts = is_document[r] && valid[i];
      const double of_valid = counts ? std::exp(scores.get(i)) / sum_valid : 0.0;
      const double of_right = counts && correct[i] ? std::exp(scores.get(i)) / sum_right : 0.0;
      const double wanted = found ? d_loss.get(r) * (of_valid - of_right) : 0.0;
      expect_close(where + " d_span_scores", i, d_scores.get(i), wanted, 1.0, type);
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
      for (const bool all_valid : {false, true}) {
        for (const std::string& isa : realm_kernels::instruction_sets()) {
          run(shape, type, all_valid, isa, static_cast<uint64_t>(++calls));
        }
      }
    }
  }
  return calls;
}

}  // namespace sanitize
