// Mode "token" of marginal_loss: the lanes of a vector are tokens, columns that share their documents' prior.
// The forward leaves a Column, not documents: those are as many as the log-likelihoods.
namespace realm_kernels {
namespace {

int64_t rounded_tokens(const MarginalLossParams& params) { return (params.tokens + 7) / 8 * 8; }

// What the forward leaves of example b: each field of all columns.
double* kept_columns(const MarginalLossParams& params, int64_t b) {
  return params.kept_columns == nullptr ? nullptr
                                        : params.kept_columns + b * kColumnFields * rounded_tokens(params);
}

// Columns [m, m + kLanes) of the rounded number.
void keep_columns(double* kept, int64_t columns, int64_t m, const Column& column) {
  double* const at = kept + m;
  memcpy(at, &column.log_likelihood, sizeof(Vec));
  memcpy(at + columns, &column.sum, sizeof(Vec));
  memcpy(at + 2 * columns, &column.share, sizeof(Vec));
  memcpy(at + 3 * columns, &column.unit, sizeof(Vec));
}

Column columns_kept(const double* kept, int64_t columns, int64_t m) {
  const double* const at = kept + m;
  return {widened(at), widened(at + columns), widened(at + 2 * columns), widened(at + 3 * columns)};
}

void load_prior(const MarginalLossParams& params, int64_t b, Prior& prior) {
  const int64_t vectors = vectors_of(params.documents);
  prior.relevance[vectors - 1] = splat(-kInfinity);
  load_relevance(params, b, reinterpret_cast<double*>(prior.relevance));
  Vec top = splat(-kInfinity), total = splat(0.0);
  for (int64_t v = 0; v < vectors; ++v) top = prior.relevance[v] > top ? prior.relevance[v] : top;
  const double largest = largest_in_all(top)[0];
  prior.shift = largest == -kInfinity ? 0.0 : largest;
  for (int64_t v = 0; v < vectors; ++v) {
    prior.mass[v] = mass_of(prior.relevance[v], prior.shift);
    total += prior.mass[v];
  }
  finish_prior(largest, sum_of(total), prior);
}

inline double lane(const Vec* values, int64_t k) { return reinterpret_cast<const double*>(values)[k]; }

// Which of tokens m .. m + lanes - 1 of example b, one a lane, are scored.
Mask scored_tokens(const MarginalLossParams& params, int64_t b, int64_t m, int lanes, const Prior& prior) {
  alignas(64) int64_t scored[kLanes];
  for (int j = 0; j < kLanes; ++j)
    scored[j] = prior.exists && j < lanes && is_scored(params, b, m + j) ? -1 : 0;
  Mask result;
  memcpy(&result, scored, sizeof result);
  return result;
}

// Tokens m .. m + lanes - 1 of example b, one a lane: where they lie in memory if that is float32, close
// together and of documents that are all there, else loaded into the scratch. What a masked document holds is
// not looked at.
struct Tokens {
  const float* source;
  int64_t stride;
  int lanes;
  Vec* loaded;

  Vec of(int64_t k) const { return source != nullptr ? load_first(source + k * stride, lanes) : loaded[k]; }
};

Tokens tokens_of(const MarginalLossParams& params, int64_t b, int64_t m, const Scratch& s, bool whole) {
  const int lanes = lanes_from(m, params.tokens);
  const int64_t first = b * params.stride_b + m * params.stride_m;
  if (whole && params.log_likelihood.type == FloatType::kFloat32 && params.stride_m == 1) {
    const float* const source = static_cast<const float*>(params.log_likelihood.data) + first;
    return {source, params.stride_k, lanes, s.log_likelihood};
  }
  for (int64_t k = 0; k < params.documents; ++k) {
    s.log_likelihood[k] =
        lane(s.prior.relevance, k) == -kInfinity
            ? splat(-kInfinity)
            : load_lanes(params.log_likelihood, first + k * params.stride_k, params.stride_m, lanes);
  }
  return {nullptr, 0, lanes, s.log_likelihood};
}

bool all_there(const MarginalLossParams& params, const Prior& prior) {
  bool whole = true;
  for (int64_t k = 0; k < params.documents; ++k) whole &= lane(prior.relevance, k) != -kInfinity;
  return whole;
}

// Those that are not scored pull nothing.
__attribute__((noinline)) Column token_columns(int64_t documents, const Scratch& s, const Tokens& tokens,
                                               Mask scored, Marginal* marginal) {
  Best best;
  for (int64_t k = 0; k < documents; ++k) best.see(splat(lane(s.prior.relevance, k)), tokens.of(k));
  Terms sums{splat(0.0), splat(0.0)};
  for (int64_t k = 0; k < documents; ++k) {
    const Terms terms = terms_of(splat(lane(s.prior.relevance, k)), s.prior.shift,
                                 splat(lane(s.prior.mass, k)), tokens.of(k) - best.log_likelihood);
    sums.joint += terms.joint;
    sums.change += terms.change;
  }
  Column column = finish_column(s.prior, best, sums, marginal, [&](const Column& deep) {
    Vec joint = splat(0.0);
    for (int64_t k = 0; k < documents; ++k) {
      joint += deep_joint(splat(lane(s.prior.relevance, k)), deep, tokens.of(k) - deep.log_likelihood);
    }
    return joint;
  });
  column.share = scored ? column.share : splat(0.0);
  return column;
}

// r added to d_relevance, and -g x the posterior to target[k stride] or, without a target, in the place of
// what was loaded. kAllFar: every lane that pulls is far, and then a document needs no expm1.
template <bool kAllFar>
__attribute__((noinline)) void token_results(int64_t documents, const Scratch& s, const Tokens& tokens,
                                             const Column& column, Vec g, float* target, int64_t stride) {
  const bool far = any(is_far(column)), deep = any(is_deep(column));
  const Mask pull = pulls(column);
  for (int64_t k = 0; k < documents; ++k) {
    const Vec relevance = splat(lane(s.prior.relevance, k)), mass = splat(lane(s.prior.mass, k));
    const Vec d = tokens.of(k) - column.log_likelihood;
    Terms terms = terms_of(relevance, s.prior.shift, mass, d);
    if (deep) terms.joint = is_deep(column) ? deep_joint(relevance, column, d) : terms.joint;
    Result result;
    if (kAllFar) {
      result.posterior = terms.joint * column.share;
      result.residual = result.posterior - mass * s.prior.inverse;
    } else {
      result = result_of(s.prior, terms, mass, column, far);
    }
    s.d_relevance[k] += pull ? result.residual : splat(0.0);
    const Vec d_log_likelihood = gradient(g, pull ? result.posterior : splat(0.0));
    if (target != nullptr) {
      store_first(target + k * stride, tokens.lanes, d_log_likelihood);
    } else {
      s.log_likelihood[k] = d_log_likelihood;
    }
  }
}

void token_forward(const MarginalLossParams& params, int64_t b, Scratch& s) {
  load_prior(params, b, s.prior);
  const bool whole = all_there(params, s.prior);
  double* const kept = kept_columns(params, b);
  Vec loss = splat(0.0);
  Mask count{};  // of -1 each
  for (int64_t m = 0; m < params.tokens; m += kLanes) {
    const Tokens tokens = tokens_of(params, b, m, s, whole);
    const Mask scored = scored_tokens(params, b, m, tokens.lanes, s.prior);
    Marginal marginal;
    const Column column = token_columns(params.documents, s, tokens, scored, &marginal);
    loss -= scored ? log_marginal(marginal) : splat(0.0);
    count += scored;
    if (kept != nullptr) keep_columns(kept, rounded_tokens(params), m, column);
  }
  params.example_loss[b] = sum_of(loss);
  params.example_count[b] = 0;
  for (int j = 0; j < kLanes; ++j) params.example_count[b] -= count[j];
}

void token_backward(const MarginalLossParams& params, int64_t b, Scratch& s) {
  const int64_t documents = params.documents;
  load_prior(params, b, s.prior);
  const bool whole = all_there(params, s.prior);
  const double* const kept = kept_columns(params, b);
  const Vec g = splat(upstream(params, b));
  const bool is_float =
      params.d_log_likelihood != nullptr && params.log_likelihood.type == FloatType::kFloat32;
  for (int64_t k = 0; k < documents; ++k) s.d_relevance[k] = splat(0.0);
  for (int64_t m = 0; m < params.tokens; m += kLanes) {
    const Tokens tokens = tokens_of(params, b, m, s, whole);
    Column column;
    if (kept != nullptr) {
      column = columns_kept(kept, rounded_tokens(params), m);
    } else {
      Marginal unused;
      const Mask scored = scored_tokens(params, b, m, tokens.lanes, s.prior);
      column = token_columns(documents, s, tokens, scored, &unused);
    }
    const int64_t first = b * documents * params.tokens + m;
    float* const target = is_float ? static_cast<float*>(params.d_log_likelihood) + first : nullptr;
    const bool all_far = !any(pulls(column) & ~is_far(column));
    (all_far ? token_results<true> : token_results<false>)(documents, s, tokens, column, g, target,
                                                           params.tokens);
    if (is_float || params.d_log_likelihood == nullptr) continue;
    for (int64_t k = 0; k < documents; ++k) {
      store_lanes(params.d_log_likelihood, params.log_likelihood.type, first + k * params.tokens,
                  tokens.lanes, s.log_likelihood[k]);
    }
  }
  if (params.d_scores == nullptr) return;
  auto* const sums = reinterpret_cast<double*>(s.d_relevance);
  for (int64_t k = 0; k < documents; ++k) sums[k] = sum_of(s.d_relevance[k]);
  store_scaled(sums, documents, g, params.d_scores, loss_type(params), b * documents);
}

}  // namespace
}  // namespace realm_kernels
