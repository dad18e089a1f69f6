// Mode "sequence" of marginal_loss: the lanes of a vector are documents, and an example is one column. The
// forward leaves r and the posterior of each document, which a backward scales; one that was left nothing
// finds them again and rounds them as they would have been left, so that both have the same bits.
namespace realm_kernels {
namespace {

// Relevance and log-likelihoods of example b. What a masked document holds is read, but never looked at.
void load_sequence(const MarginalLossParams& params, int64_t b, Scratch& s) {
  Vec* const relevance = s.prior.relevance;
  const int64_t documents = params.documents, last = (documents - 1) / kLanes;
  relevance[last] = splat(-kInfinity);
  s.log_likelihood[last] = splat(0.0);
  load_relevance(params, b, reinterpret_cast<double*>(relevance));
  if (params.tokens == 1) {  // masked, it is not scored, and nothing of the example is looked at
    load(params.log_likelihood, b * params.stride_b, params.stride_k, documents,
         reinterpret_cast<double*>(s.log_likelihood));
  } else {
    sum_tokens(params, b, reinterpret_cast<double*>(s.log_likelihood));
  }
  for (int64_t v = 0; v <= last; ++v) {
    s.log_likelihood[v] = relevance[v] == -kInfinity ? relevance[v] : s.log_likelihood[v];
  }
}

// The prior and the one column of what was loaded. A document's mass, e and joint take the place of what was
// loaded of it.
__attribute__((noinline)) Column sequence_column(const MarginalLossParams& params, int64_t b, Scratch& s,
                                                 Marginal* marginal) {
  const int64_t vectors = vectors_of(params.documents);
  Vec top = splat(-kInfinity);
  Best best;
  for (int64_t v = 0; v < vectors; ++v) {
    const Vec relevance = s.prior.relevance[v];
    top = relevance > top ? relevance : top;
    best.see(relevance, s.log_likelihood[v]);
  }
  best = best.of_lanes();
  const double largest = largest_in_all(top)[0], shift = largest == -kInfinity ? 0.0 : largest;
  s.prior.shift = shift;
  Vec total = splat(0.0);
  Terms sums{splat(0.0), splat(0.0)};
  for (int64_t v = 0; v < vectors; ++v) {
    const Vec relevance = s.prior.relevance[v], mass = mass_of(relevance, shift);
    const Terms terms = terms_of(relevance, shift, mass, s.log_likelihood[v] - best.log_likelihood);
    s.prior.relevance[v] = mass;
    s.log_likelihood[v] = terms.change;
    s.joint[v] = terms.joint;
    total += mass;
    sums.joint += terms.joint;
    sums.change += terms.change;
  }
  finish_prior(largest, sum_of(total), s.prior);
  sums = {splat(sum_of(sums.joint)), splat(sum_of(sums.change))};
  return finish_column(s.prior, best, sums, marginal, [&](const Column& column) {
    load_sequence(params, b, s);
    Vec joint = splat(0.0);
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec relevance = s.prior.relevance[v];
      s.joint[v] = deep_joint(relevance, column, s.log_likelihood[v] - column.log_likelihood);
      s.prior.relevance[v] = mass_of(relevance, shift);
      joint += s.joint[v];
    }
    return splat(sum_of(joint));
  });
}

// r and the posterior of every document.
template <class T>
__attribute__((noinline)) void sequence_results(int64_t documents, const Scratch& s, const Column& column,
                                                T* residual, T* posterior) {
  if (!pulls(column)[0]) {
    memset(residual, 0, documents * sizeof(T));
    memset(posterior, 0, documents * sizeof(T));
    return;
  }
  const bool far = any(is_far(column));
  for (int64_t v = 0; v < vectors_of(documents); ++v) {
    const int64_t k = v * kLanes;
    const int lanes = lanes_from(k, documents);
    const Result result =
        result_of(s.prior, {s.joint[v], s.log_likelihood[v]}, s.prior.relevance[v], column, far);
    store_first(residual + k, lanes, result.residual);
    store_first(posterior + k, lanes, result.posterior);
  }
}

// Marginals of sequences, one a lane, until there are kLanes of them.
struct Pending {
  alignas(64) double fields[kMarginalFields][kLanes];
  int count = 0;

  void add(const Marginal& marginal) {
    fields[0][count] = marginal.log_likelihood[0];
    fields[1][count] = marginal.sum[0];
    fields[2][count] = marginal.ratio[0];
    fields[3][count++] = marginal.log_unit[0];
  }

  // Those of the examples before `end`.
  void flush(const MarginalLossParams& params, int64_t end) {
    for (int j = count; j < kLanes; ++j) {
      fields[0][j] = fields[1][j] = fields[3][j] = 0.0;
      fields[2][j] = 1.0;
    }
    const Vec loss =
        -log_marginal({widened(fields[0]), widened(fields[1]), widened(fields[2]), widened(fields[3])});
    double* const first = params.example_loss + end - count;
    // Where nothing is scored it is not minus zero.
    for (int j = 0; j < count; ++j) first[j] = params.example_count[end - count + j] != 0 ? loss[j] : 0.0;
    count = 0;
  }
};

template <class T>
void sequence_forward(const MarginalLossParams& params, int64_t b, Scratch& s, Pending& pending) {
  Marginal marginal{splat(0.0), splat(0.0), splat(1.0), splat(0.0)};
  Column column{};
  const bool any = any_scored(params, b);
  if (any) {
    load_sequence(params, b, s);
    column = sequence_column(params, b, s, &marginal);
  }
  params.example_count[b] = any && s.prior.exists ? 1 : 0;
  pending.add(marginal);
  T* const residual = static_cast<T*>(params.kept_residual);
  T* const posterior = static_cast<T*>(params.kept_posterior);
  if (residual == nullptr && posterior == nullptr) return;
  const int64_t first = b * params.documents;
  T* const spare = reinterpret_cast<T*>(s.spare);
  sequence_results(params.documents, s, column, residual == nullptr ? spare : residual + first,
                   posterior == nullptr ? spare : posterior + first);
}

template <class T>
void sequence_backward(const MarginalLossParams& params, int64_t b, Scratch& s) {
  const int64_t documents = params.documents, first = b * documents;
  const T* residual = static_cast<const T*>(params.kept_residual);
  const T* posterior = static_cast<const T*>(params.kept_posterior);
  if (residual != nullptr || posterior != nullptr) {
    if (residual != nullptr) residual += first;
    if (posterior != nullptr) posterior += first;
  } else {
    Column column{};
    if (any_scored(params, b)) {
      Marginal unused;
      load_sequence(params, b, s);
      column = sequence_column(params, b, s, &unused);
    }
    T* const found = reinterpret_cast<T*>(s.spare);
    T* const also_found = reinterpret_cast<T*>(s.spare + vectors_of(documents));
    sequence_results(documents, s, column, found, also_found);
    residual = found, posterior = also_found;
  }
  const Vec g = splat(upstream(params, b));
  if (params.d_scores != nullptr) {
    store_scaled(residual, documents, g, params.d_scores, loss_type(params), first);
  }
  if (params.d_log_likelihood == nullptr) return;
  if (params.tokens == 1) {  // where it is not scored, the posterior is zero
    store_scaled(posterior, documents, g, params.d_log_likelihood, params.log_likelihood.type, first);
  } else {
    store_scaled(posterior, documents, g, s.joint, FloatType::kFloat64, 0);
    spread_over_tokens(params, b, reinterpret_cast<const double*>(s.joint));
  }
}

}  // namespace
}  // namespace realm_kernels
