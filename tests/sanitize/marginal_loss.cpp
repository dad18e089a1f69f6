// marginal_loss, forward and backward, against the formulas written out (docs/design.md, section 6): both
// modes, every stride, masks, documents without a score, NaN behind masks.
#include "cpu/marginal_loss.h"

#include <algorithm>

#include "cases.h"

namespace sanitize {
namespace {

using realm_kernels::MarginalLossParams;
using realm_kernels::Reduction;

struct Shape {
  int64_t batch, documents, tokens;
};
constexpr Shape kShapes[] = {{0, 3, 2},  {1, 1, 1},   {3, 5, 0},  {7, 9, 1},
                             {5, 3, 13}, {19, 17, 7}, {70, 65, 9}};
constexpr FloatType kTypes[] = {FloatType::kFloat64, FloatType::kFloat32, FloatType::kBFloat16,
                                FloatType::kFloat16};

double log_sum_exp(const std::vector<double>& x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0.0;
  for (const double value : x) {
    sum += std::exp(value - top);
  }
  return std::isinf(top) ? top : top + std::log(sum);
}

struct Problem {
  Problem(const Shape& shape, FloatType type, bool masked, int order, uint64_t seed)
      : shape(shape),
        masked(masked),
        scores(type, shape.batch * shape.documents),
        log_weight(type, shape.batch * shape.documents),
        log_likelihood(type, 0),
        token_mask(shape.batch * shape.tokens, true),
        doc_mask(shape.batch * shape.documents, true) {
    const auto [batch, documents, tokens] = shape;
    Random random(seed);
    if (masked) {
      token_mask = draw_mask(random, batch * tokens, 0.7);
      doc_mask = draw_mask(random, batch * documents, 0.7);
    }
    // The tokens close together; the documents close together; a gap behind every document.
    const int64_t gap = order == 2 ? 3 : 0;
    stride_k = order == 1 ? 1 : tokens + gap;
    stride_m = order == 1 ? documents : 1;
    stride_b = documents * (tokens + gap);
    const bool empty = batch * tokens == 0;
    log_likelihood = Elements(type, empty ? 0 : offset(batch - 1, documents - 1, tokens - 1) + 1);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t k = 0; k < documents; ++k) {
        const int64_t i = b * documents + k;
        // What a mask hides may be anything; a score of -inf is another way to hide a document.
        scores.set(i, !doc_mask[i]                     ? kNan
                      : masked && random.below(9) == 0 ? -kInfinity
                                                       : random.uniform(-2, 2));
        log_weight.set(i, random.uniform(-1, 0));
        for (int64_t m = 0; m < tokens; ++m) {
          const bool hidden = !doc_mask[i] || !token_mask[b * tokens + m];
          log_likelihood.set(offset(b, k, m), hidden ? kNan : -random.uniform(0, 4));
        }
      }
    }
  }

  int64_t offset(int64_t b, int64_t k, int64_t m) const { return b * stride_b + k * stride_k + m * stride_m; }

  Shape shape;
  bool masked;
  Elements scores, log_weight, log_likelihood;
  Mask token_mask, doc_mask;
  int64_t stride_b = 0, stride_k = 0, stride_m = 0;
};

struct Expected {
  std::vector<double> loss, d_scores, d_log_likelihood;  // [B], [B, K], [B, K, M]; of one example's own loss
  std::vector<int64_t> count;                            // [B]
};

Expected expected(const Problem& problem, bool per_token) {
  const auto [batch, documents, tokens] = problem.shape;
  Expected result;
  result.loss.assign(batch, 0.0);
  result.count.assign(batch, 0);
  result.d_scores.assign(batch * documents, 0.0);
  result.d_log_likelihood.assign(batch * documents * tokens, 0.0);
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> log_prior(documents, -kInfinity);
    for (int64_t k = 0; k < documents; ++k) {
      const int64_t i = b * documents + k;
      if (problem.doc_mask[i]) {
        log_prior[k] = problem.scores.get(i) + problem.log_weight.get(i);
      }
    }
    const double normaliser = log_sum_exp(log_prior);
    if (std::isinf(normaliser)) {
      continue;
    }
    std::vector<std::vector<int64_t>> columns;  // the tokens that one document is drawn for
    for (int64_t m = 0; m < tokens; ++m) {
      if (problem.token_mask[b * tokens + m]) {
        if (per_token || columns.empty()) {
          columns.emplace_back();
        }
        columns.back().push_back(m);
      }
    }
    for (const std::vector<int64_t>& column : columns) {
      std::vector<double> joint(documents, -kInfinity);
      for (int64_t k = 0; k < documents; ++k) {
        joint[k] = log_prior[k] - normaliser;
        for (const int64_t m : column) {
          joint[k] += joint[k] == -kInfinity ? 0.0 : problem.log_likelihood.get(problem.offset(b, k, m));
        }
      }
      const double marginal = log_sum_exp(joint);
      result.loss[b] -= marginal;
      result.count[b] += 1;
      for (int64_t k = 0; k < documents; ++k) {
        const double posterior = std::exp(joint[k] - marginal);
        result.d_scores[b * documents + k] -= posterior - std::exp(log_prior[k] - normaliser);
        for (const int64_t m : column) {
          result.d_log_likelihood[(b * documents + k) * tokens + m] = -posterior;
        }
      }
    }
  }
  return result;
}

// keeps: whether the forward leaves something for the backward.
void run(const Problem& problem, bool per_token, Reduction reduction, bool keeps, int num_threads,
         const std::string& isa) {
  const auto [batch, documents, tokens] = problem.shape;
  const FloatType type = problem.scores.type();
  const bool wide = type == FloatType::kFloat64;
  const FloatType result_type = wide ? FloatType::kFloat64 : FloatType::kFloat32;
  const bool none = reduction == Reduction::kNone;
  const std::string where = "marginal_loss " + isa + " " + name_of(type) + " B=" + std::to_string(batch) +
                            " K=" + std::to_string(documents) + " M=" + std::to_string(tokens) +
                            (per_token ? " token" : " sequence") + (none ? " none" : " mean") +
                            (keeps ? " kept" : "");
  Elements loss(result_type, none ? batch : 1), d_loss(result_type, none ? batch : 1);
  Elements d_scores(result_type, batch * documents), d_log_likelihood(type, batch * documents * tokens);
  std::vector<int64_t> count(batch, -7);
  for (int64_t i = 0; i < d_loss.count(); ++i) {
    d_loss.set(i, 0.5 + static_cast<double>(i % 3));
  }
  MarginalLossParams params{};
  params.scores = {problem.scores.data(), type};
  params.log_likelihood = {problem.log_likelihood.data(), type};
  params.log_weight = {problem.log_weight.data(), type};
  params.token_mask = problem.masked ? problem.token_mask.data() : nullptr;
  params.doc_mask = problem.masked ? problem.doc_mask.data() : nullptr;
  params.batch = batch;
  params.documents = documents;
  params.tokens = tokens;
  params.stride_b = problem.stride_b;
  params.stride_k = problem.stride_k;
  params.stride_m = problem.stride_m;
  params.per_token = per_token;
  params.wide = wide;
  params.reduction = reduction;
  params.loss = loss.data();
  params.count = none ? count.data() : nullptr;
  params.num_threads = num_threads;
  params.isa = realm_kernels::choose_isa(isa);
  Elements kept_residual(result_type, keeps ? batch * documents : 0);
  Elements kept_posterior(result_type, keeps ? batch * documents : 0);
  std::vector<double> kept_columns(keeps ? batch * 4 * ((tokens + 7) / 8 * 8) : 0);
  if (keeps && per_token && tokens > 1) {
    params.kept_columns = kept_columns.data();
  } else if (keeps) {
    params.kept_residual = kept_residual.data();
    params.kept_posterior = kept_posterior.data();
  }
  const int64_t counted = launch_marginal_loss_fwd(params);
  params.d_loss = d_loss.data();
  params.divisor = none ? 1.0 : static_cast<double>(std::max<int64_t>(1, counted));
  params.d_scores = d_scores.data();
  params.d_log_likelihood = d_log_likelihood.data();
  launch_marginal_loss_bwd(params);

  const Expected wanted = expected(problem, per_token);
  int64_t total = 0;
  double sum = 0.0;
  for (int64_t b = 0; b < batch; ++b) {
    total += wanted.count[b];
    sum += wanted.loss[b];
    if (none) {
      expect_close(where + " loss", b, loss.get(b), wanted.loss[b], wanted.loss[b], result_type);
    }
  }
  if (counted != total || (none && count != wanted.count)) {
    fail(where + " count", 0, static_cast<double>(counted), static_cast<double>(total));
  }
  if (!none) {
    const double mean = sum / static_cast<double>(std::max<int64_t>(1, total));
    expect_close(where + " loss", 0, loss.get(0), mean, sum, result_type);
  }
  for (int64_t i = 0; i < batch * documents; ++i) {
    const double g = d_loss.get(none ? i / documents : 0) / params.divisor;
    const auto columns = static_cast<double>(1 + wanted.count[i / documents]);
    expect_close(where + " d_scores", i, d_scores.get(i), g * wanted.d_scores[i], columns, result_type);
    for (int64_t m = 0; m < tokens; ++m) {
      const int64_t j = i * tokens + m;
      expect_close(where + " d_log_likelihood", j, d_log_likelihood.get(j), g * wanted.d_log_likelihood[j],
                   1.0, type);
    }
  }
}

}  // namespace

int64_t run_marginal_loss() {
  int64_t calls = 0;
  for (const Shape& shape : kShapes) {
    for (const FloatType type : kTypes) {
      if (kThreadsOnly && type != FloatType::kFloat32) {
        continue;
      }
      for (int order = 0; order < 3; ++order) {
        const bool masked = order > 0;
        const Problem problem(shape, type, masked, order, static_cast<uint64_t>(++calls));
        for (const std::string& isa : realm_kernels::instruction_sets()) {
          for (const bool per_token : {false, true}) {
            for (const bool keeps : {false, true}) {
              run(problem, per_token, masked ? Reduction::kNone : Reduction::kMean, keeps, 3, isa);
              ++calls;
            }
          }
        }
      }
    }
  }
  return calls;
}

}  // namespace sanitize
