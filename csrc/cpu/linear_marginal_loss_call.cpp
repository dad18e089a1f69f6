// A call of linear_marginal_loss: chunks of its rows, one after another. A chunk of whole examples has their
// posteriors as soon as it is scored, so its gradients follow while its exponentials are in the caches.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/linear_marginal_loss.h"

namespace realm_kernels {
namespace {

int64_t size_of(FloatType type) {
  return type == FloatType::kFloat64 ? 8 : type == FloatType::kFloat32 ? 4 : 2;
}

const void* advance(const FloatArray& array, int64_t elements) {
  return array.data == nullptr ? nullptr
                               : static_cast<const char*>(array.data) + elements * size_of(array.type);
}

// factor becomes the posterior of examples [begin, end): the marginal loss's gradient to the log-likelihood,
// negated.
void posterior(const LinearMarginalLossCall& call, int64_t begin, int64_t end) {
  const MarginalLossParams& all = call.documents;
  const int64_t of_example = all.documents * all.tokens;
  const std::vector<double> ones(static_cast<std::size_t>(end - begin), 1.0);
  double* out = call.factor + begin * of_example;
  MarginalLossParams some = all;
  some.scores.data = advance(all.scores, begin * all.documents);
  some.log_weight.data = advance(all.log_weight, begin * all.documents);
  some.token_mask = all.token_mask + begin * all.tokens;
  some.doc_mask = all.doc_mask == nullptr ? nullptr : all.doc_mask + begin * all.documents;
  some.log_likelihood = {call.log_likelihood + begin * of_example, FloatType::kFloat64};
  some.stride_b = of_example;
  some.stride_k = all.tokens;
  some.stride_m = 1;
  some.batch = end - begin;
  some.wide = true;
  some.d_loss = ones.data();
  some.divisor = 1.0;
  some.d_log_likelihood = out;
  launch_marginal_loss_bwd(some);
  std::transform(out, out + some.batch * of_example, out, [](double d) { return -d; });
}

}  // namespace

int64_t launch_linear_marginal_loss(const LinearMarginalLossCall& call) {
  const int64_t tokens = call.documents.tokens, of_example = call.documents.documents * tokens;
  const auto most = static_cast<std::size_t>(call.chunk.rows);
  std::vector<int64_t> place(most), targets(most);
  std::vector<double> log_p(most), log_sum(most), factor(most);
  LinearMarginalLossParams chunk = call.chunk;
  chunk.place = place.data();
  chunk.targets = targets.data();
  chunk.log_p = log_p.data();
  chunk.log_sum = log_sum.data();
  chunk.factor = factor.data();
  chunk.first = true;
  int64_t scored = 0;
  for (const auto& [first, last] : call.ranges) {
    chunk.rows = 0;
    for (int64_t row = first; row < last; ++row) {
      if (call.live[row]) {
        place[chunk.rows] = row;
        targets[chunk.rows++] = call.targets[row / of_example * tokens + row % tokens];
      }
    }
    if (chunk.rows == 0) {
      continue;
    }
    scored += chunk.rows;
    launch_linear_marginal_loss_fwd(chunk);
    if (!call.has_factor) {
      for (int64_t r = 0; r < chunk.rows; ++r) {
        call.log_likelihood[place[r]] = log_p[r];
      }
    }
    if (chunk.workspace == nullptr) {
      continue;
    }
    if (!call.has_factor) {
      posterior(call, first / of_example, last / of_example);
    }
    for (int64_t r = 0; r < chunk.rows; ++r) {
      factor[r] = call.factor[place[r]];
    }
    launch_linear_marginal_loss_bwd(chunk);
    chunk.first = false;
  }
  if (chunk.d_weight != nullptr && chunk.first) {
    std::memset(chunk.d_weight, 0, static_cast<std::size_t>(chunk.vocabulary * chunk.width) * sizeof(float));
  }
  return scored;
}

}  // namespace realm_kernels
