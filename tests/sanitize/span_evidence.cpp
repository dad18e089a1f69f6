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
  const auto wide = [&] { return Elements(FloatType::kFloat64, rows); };
  Elements right = wide(), wrong = wide(), log_likelihood = wide(), log_normalizer = wide();
  Elements d_log_likelihood = wide(), d_log_normalizer = wide();
  Mask has_correct(rows, false);
  for (int64_t r = 0; r < rows; ++r) {
    d_log_likelihood.set(r, random.uniform(-1, 1));
    d_log_normalizer.set(r, random.uniform(-1, 1));
  }
  SpanEvidenceParams params{};
  params.span_scores = {scores.data(), type};
  params.correct = correct.data();
  params.valid = all_valid ? nullptr : valid.data();
  params.is_document = is_document.data();
  params.rows = rows;
  params.spans = spans;
  params.right = static_cast<double*>(right.data());
  params.wrong = static_cast<double*>(wrong.data());
  params.log_likelihood = static_cast<double*>(log_likelihood.data());
  params.log_normalizer = static_cast<double*>(log_normalizer.data());
  params.has_correct = has_correct.data();
  params.num_threads = 3;
  params.isa = realm_kernels::choose_isa(isa);
  launch_span_evidence_fwd(params);
  params.d_log_likelihood = static_cast<const double*>(d_log_likelihood.data());
  params.d_log_normalizer = static_cast<const double*>(d_log_normalizer.data());
  params.d_span_scores = d_scores.data();
  launch_span_evidence_bwd(params);

  for (int64_t r = 0; r < rows; ++r) {
    double sum_right = 0.0, sum_valid = 0.0;
    for (int64_t i = r * spans; i < (r + 1) * spans; ++i) {
      const double e = is_document[r] && valid[i] ? std::exp(scores.get(i)) : 0.0;
      sum_valid += e;
      sum_right += correct[i] ? e : 0.0;
    }
    const double normalizer = std::log(sum_valid), likelihood = std::log(sum_right) - normalizer;
    const bool found = sum_right > 0.0;
    expect_close(where + " log_likelihood", r, log_likelihood.get(r), found ? likelihood : -kInfinity, 8.0,
                 FloatType::kFloat64);
    expect_close(where + " log_normalizer", r, log_normalizer.get(r), normalizer, 8.0, FloatType::kFloat64);
    if (has_correct[r] != found) {
      fail(where + " has_correct", r, has_correct[r], found);
    }
    for (int64_t i = r * spans; i < (r + 1) * spans; ++i) {
      const bool counts = is_document[r] && valid[i];
      const double of_valid = counts ? std::exp(scores.get(i)) / sum_valid : 0.0;
      const double of_right = counts && correct[i] ? std::exp(scores.get(i)) / sum_right : 0.0;
      // The likelihood is a constant where no span is right.
      const double d_likelihood = found ? d_log_likelihood.get(r) : 0.0;
      const double wanted = d_likelihood * (of_right - of_valid) + d_log_normalizer.get(r) * of_valid;
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
