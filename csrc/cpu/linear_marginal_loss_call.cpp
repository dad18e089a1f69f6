// A call of linear_marginal_loss: chunks of its rows, one after another. A chunk of whole examples has their
// posteriors as soon as it is scored, so its gradients follow while its exponentials are in the caches.
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/linear_marginal_loss.h"
#include "cpu/marginal_loss_float.inl"

namespace realm_kernels {
namespace {

const void* advance(const FloatArray& array, int64_t elements) {
  return array.data == nullptr ? nullptr
                               : static_cast<const char*>(array.data) + elements * size_of(array.type);
}

using Flags = std::unique_ptr<bool[]>;
Flags flags(int64_t count) { return std::make_unique<bool[]>(static_cast<std::size_t>(count)); }

// The rows [B, K, M] of a call: which have a part.
class Rows {
 public:
  explicit Rows(const LinearMarginalLossCall& call)
      : call_(call),
        tokens_(call.documents.tokens),
        of_example_(call.documents.documents * tokens_),
        scored_(flags(call.documents.batch * tokens_)),
        present_(flags(call.documents.batch * call.documents.documents)) {
    std::transform(call.targets, call.targets + call.documents.batch * tokens_, scored_.get(),
                   [&](int64_t target) { return target != call.ignore_index; });
    find_documents(call.documents);
  }

  int64_t count() const { return call_.documents.batch * of_example_; }
  int64_t of_example() const { return of_example_; }
  const bool* scored() const { return scored_.get(); }  // [B, M]
  int64_t target(int64_t row) const { return call_.targets[token(row)]; }
  bool has_part(int64_t row) const {
    return present_[row / tokens_] && scored_[token(row)] && !(call_.has_factor && call_.factor[row] == 0.0);
  }

 private:
  int64_t token(int64_t row) const { return row / of_example_ * tokens_ + row % tokens_; }

  // Documents that are masked neither by doc_mask nor by a relevance of -inf.
  void find_documents(const MarginalLossParams& all) {
    const int64_t count = all.batch * all.documents;
    std::vector<double> relevance(static_cast<std::size_t>(count)), log_weight(relevance.size());
    load(all.scores, 0, 1, count, relevance.data());
    if (all.log_weight.data != nullptr) {
      load(all.log_weight, 0, 1, count, log_weight.data());
    }
    for (int64_t i = 0; i < count; ++i) {
      present_[i] = relevance[i] + log_weight[i] != -std::numeric_limits<double>::infinity() &&
                    (all.doc_mask == nullptr || all.doc_mask[i]);
    }
  }

  const LinearMarginalLossCall& call_;
  int64_t tokens_, of_example_;
  Flags scored_, present_;
};

// Less its largest: softmax does not see it, and float32 logits would lose digits.
std::vector<float> centred_bias(const FloatArray& bias, int64_t vocabulary) {
  if (bias.data == nullptr) {
    return {};
  }
  std::vector<double> wide(static_cast<std::size_t>(vocabulary));
  load(bias, 0, 1, vocabulary, wide.data());
  const double largest = *std::max_element(wide.begin(), wide.end());
  std::vector<float> centred(wide.size());
  std::transform(wide.begin(), wide.end(), centred.begin(),
                 [&](double word) { return static_cast<float>(word - largest); });
  return centred;
}

// The marginal loss of examples [begin, end), whose rows have been scored.
MarginalLossParams examples(const LinearMarginalLossCall& call, int64_t begin, int64_t end) {
  const MarginalLossParams& all = call.documents;
  const int64_t of_example = all.documents * all.tokens;
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
  return some;
}

// factor becomes the posterior of examples [begin, end): the marginal loss's gradient to the log-likelihood,
// negated.
void posterior(const LinearMarginalLossCall& call, int64_t begin, int64_t end) {
  MarginalLossParams some = examples(call, begin, end);
  const int64_t of_example = some.documents * some.tokens;
  const std::vector<double> ones(static_cast<std::size_t>(end - begin), 1.0);
  double* out = call.factor + begin * of_example;
  some.wide = true;
  some.reduction = Reduction::kNone;
  some.divisor = 1.0;
  some.d_loss = ones.data();
  some.d_log_likelihood = out;
  launch_marginal_loss_bwd(some);
  std::transform(out, out + some.batch * of_example, out, [](double d) { return -d; });
}

// The rows of one chunk, and what the kernels tell of them.
struct Chunk {
  std::vector<int64_t> place, targets;
  std::vector<double> log_p, log_sum, factor;
  explicit Chunk(LinearMarginalLossParams& params)
      : place(static_cast<std::size_t>(params.rows)),
        targets(place.size()),
        log_p(place.size()),
        log_sum(place.size()),
        factor(place.size()) {
    params.place = place.data();
    params.targets = targets.data();
    params.log_p = log_p.data();
    params.log_sum = log_sum.data();
    params.factor = factor.data();
  }
};

// What rows without a part get.
void leave_out(const LinearMarginalLossCall& call, int64_t row) {
  const LinearMarginalLossParams& chunk = call.chunk;
  if (!call.has_factor) {
    call.log_likelihood[row] = 0.0;
  }
  if (chunk.d_hidden != nullptr) {
    const int64_t bytes = chunk.width * size_of(chunk.d_hidden_type);
    std::memset(static_cast<char*>(chunk.d_hidden) + row * bytes, 0, static_cast<std::size_t>(bytes));
  }
}

// Takes the rows from `first` on that have a part: as many examples, or rows, as fit. Returns where the next
// chunk begins.
int64_t gather(const LinearMarginalLossCall& call, const Rows& rows, int64_t first, Chunk& chunk,
               int64_t& taken) {
  const int64_t unit = call.whole_examples ? rows.of_example() : 1;
  taken = 0;
  for (; first < rows.count(); first += unit) {
    int64_t more = 0;
    for (int64_t row = first; row < first + unit; ++row) {
      more += rows.has_part(row);
    }
    if (taken + more > call.chunk.rows) {
      break;
    }
    for (int64_t row = first; row < first + unit; ++row) {
      if (!rows.has_part(row)) {
        leave_out(call, row);
        continue;
      }
      chunk.place[taken] = row;
      chunk.targets[taken++] = rows.target(row);
    }
  }
  return first;
}

}  // namespace

LinearMarginalLossResult launch_linear_marginal_loss(const LinearMarginalLossCall& given) {
  LinearMarginalLossCall call = given;
  const Rows rows(call);
  call.documents.token_mask = rows.scored();
  LinearMarginalLossParams params = call.chunk;
  Chunk chunk(params);
  const std::vector<float> bias = centred_bias(call.bias, params.vocabulary);
  params.bias = bias.empty() ? nullptr : bias.data();
  params.first = true;
  if (params.d_bias != nullptr) {
    std::fill_n(params.d_bias, params.vocabulary, 0.0f);
  }
  LinearMarginalLossResult result{};
  for (int64_t first = 0, next = 0; first < rows.count(); first = next) {
    next = gather(call, rows, first, chunk, params.rows);
    if (params.rows == 0) {
      continue;
    }
    result.rows_with_part += params.rows;
    launch_linear_marginal_loss_fwd(params);
    if (!call.has_factor) {
      for (int64_t r = 0; r < params.rows; ++r) {
        call.log_likelihood[chunk.place[r]] = chunk.log_p[r];
      }
    }
    if (params.workspace == nullptr) {
      continue;
    }
    if (!call.has_factor) {
      posterior(call, first / rows.of_example(), next / rows.of_example());
    }
    for (int64_t r = 0; r < params.rows; ++r) {
      chunk.factor[r] = call.factor[chunk.place[r]];
    }
    launch_linear_marginal_loss_bwd(params);
    params.first = false;
  }
  if (params.d_weight != nullptr && params.first) {
    std::memset(params.d_weight, 0,
                static_cast<std::size_t>(params.vocabulary * params.width) * sizeof(float));
  }
  if (!call.has_factor) {
    result.counted = launch_marginal_loss_fwd(examples(call, 0, call.documents.batch));
  }
  return result;
}

}  // namespace realm_kernels
