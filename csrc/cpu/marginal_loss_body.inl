// The body of marginal_loss, compiled once for each instruction set with kLanes doubles to a vector: how the
// columns of the two modes become lanes, what is read and what is written. Log-likelihoods are read once.
//
// Nothing here may be shared with another translation unit (no std templates): the linker might keep the copy
// for an instruction set this processor lacks.
#include <string.h>

#include "cpu/marginal_loss_columns.inl"
#include "cpu/marginal_loss_float.inl"
#include "cpu/marginal_loss_kernels.h"
#include "cpu/marginal_loss_rows.inl"

namespace realm_kernels {
namespace {

// s_k + log w_k of example b to out[k], -inf where masked.
void load_relevance(const MarginalLossParams& params, int64_t b, double* out) {
  const int64_t offset = b * params.documents;
  load(params.scores, offset, 1, params.documents, out);
  double log_weight[kChunk];
  for (int64_t first = 0; first < params.documents && params.log_weight.data != nullptr; first += kChunk) {
    const int count = chunk_from(first, params.documents);
    load(params.log_weight, offset + first, 1, count, log_weight);
    for (int i = 0; i < count; ++i) out[first + i] += log_weight[i];
  }
  const bool* const mask = params.doc_mask == nullptr ? nullptr : params.doc_mask + offset;
  for (int64_t k = 0; k < params.documents && mask != nullptr; ++k) out[k] = mask[k] ? out[k] : -kInfinity;
}

// -g x value. Selected where that is zero: an infinite g times zero would be NaN.
inline Vec gradient(Vec g, Vec value) { return value != 0.0 ? -g * value : splat(0.0); }

double upstream(const MarginalLossParams& params, int64_t b) {
  const int64_t i = params.reduction == Reduction::kNone ? b : 0;
  const double d_loss = params.wide ? static_cast<const double*>(params.d_loss)[i]
                                    : static_cast<const float*>(params.d_loss)[i];
  return d_loss / params.divisor;
}

int64_t vectors_of(int64_t count) { return (count + kLanes - 1) / kLanes; }

void load_prior(const MarginalLossParams& params, int64_t b, Columns& c) {
  const int64_t vectors = vectors_of(params.documents);
  c.prior.relevance[vectors - 1] = splat(-kInfinity);
  load_relevance(params, b, reinterpret_cast<double*>(c.prior.relevance));
  normalise(vectors, c.prior);
}

// Mode "sequence": the documents of example b lie in the lanes. False where the example is not scored.
bool load_sequence(const MarginalLossParams& params, int64_t b, Columns& c) {
  if (!any_scored(params, b)) return false;
  load_prior(params, b, c);
  c.log_likelihood[vectors_of(params.documents) - 1] = splat(0.0);
  sum_tokens(params, b, reinterpret_cast<double*>(c.log_likelihood));
  return c.prior.exists;
}

void nothing(Columns& c, int64_t vectors) {
  for (int64_t v = 0; v < vectors; ++v) c.d_relevance[v] = c.shifted[v] = splat(0.0);
  c.loss = splat(0.0);
}

// The type of the loss, its gradient to scores, and of what is kept.
FloatType loss_type(const MarginalLossParams& params) {
  return params.wide ? FloatType::kFloat64 : FloatType::kFloat32;
}

// A value as it is kept. A backward that finds it again rounds it too, so that both have the same bits.
Vec as_kept(const MarginalLossParams& params, Vec value) {
  return params.wide ? value : __builtin_convertvector(__builtin_convertvector(value, FloatVec), Vec);
}

void keep_residual(const MarginalLossParams& params, int64_t b, const Vec* residual) {
  if (params.kept_residual == nullptr) return;
  store(params.kept_residual, loss_type(params), b * params.documents, params.documents,
        reinterpret_cast<const double*>(residual), 1);
}

// r to c.d_relevance and the posterior to c.shifted, 0 where the column pulls nothing. Both, whoever asks for
// them: a posterior that only the residual needed would be fused into the residual's subtraction, and the
// bits of d_scores would depend on which gradients are wanted.
void residuals(Columns& c, int64_t vectors) {
  const Centre centre = centre_columns<true>(vectors, c);
  const bool pulls = !centre.impossible[0];
  for (int64_t v = 0; v < vectors; ++v) {
    const Shifted s = pulls ? posterior_of<true>(c, v, centre) : Shifted{};
    c.d_relevance[v] = s.change;
    c.shifted[v] = s.joint;
  }
  c.loss = -log_marginal(c, centre);
}

void sequence_forward(const MarginalLossParams& params, int64_t b, Columns& c) {
  const int64_t vectors = vectors_of(params.documents);
  const bool keeps = params.kept_residual != nullptr || params.kept_posterior != nullptr;
  const bool scored = load_sequence(params, b, c);
  if (!scored) {
    nothing(c, vectors);
  } else if (keeps) {
    residuals(c, vectors);
  } else {
    c.loss = -log_marginal(c, centre_columns<true>(vectors, c));
  }
  params.example_count[b] = scored ? 1 : 0;
  params.example_loss[b] = c.loss[0];
  keep_residual(params, b, c.d_relevance);
  if (params.kept_posterior != nullptr) {
    store(params.kept_posterior, loss_type(params), b * params.documents, params.documents,
          reinterpret_cast<const double*>(c.shifted), 1);
  }
}

// -g x `count` numbers of the type of the loss, from `offset` of kept, to store_scaled(first, count, values).
template <class Store>
void scale(const MarginalLossParams& params, const void* kept, int64_t offset, int64_t count, double g,
           const Store& store_scaled) {
  double values[kChunk];
  for (int64_t first = 0; first < count; first += kChunk) {
    const int chunk = chunk_from(first, count);
    load({kept, loss_type(params)}, offset + first, 1, chunk, values);
    for (int i = 0; i < chunk; ++i) values[i] = values[i] != 0.0 ? -g * values[i] : 0.0;
    store_scaled(first, chunk, values);
  }
}

// Scales what the forward left.
void kept_backward(const MarginalLossParams& params, int64_t b, Columns& c) {
  const double g = upstream(params, b);
  const int64_t documents = params.documents;
  if (params.d_scores != nullptr) {
    scale(params, params.kept_residual, b * documents, documents, g,
          [&](int64_t first, int count, const double* values) {
            store(params.d_scores, loss_type(params), b * documents + first, count, values, 1);
          });
  }
  if (params.d_log_likelihood == nullptr) return;
  const FloatType type = params.log_likelihood.type;
  if (params.per_token) {
    const int64_t size = documents * params.tokens, offset = b * size;
    scale(params, params.kept_posterior, offset, size, g,
          [&](int64_t first, int count, const double* values) {
            store(params.d_log_likelihood, type, offset + first, count, values, 1);
          });
    return;
  }
  auto* const d_sequence = reinterpret_cast<double*>(c.shifted);
  scale(params, params.kept_posterior, b * documents, documents, g,
        [&](int64_t first, int count, const double* values) {
          memcpy(d_sequence + first, values, count * sizeof(double));
        });
  spread_over_tokens(params, b, d_sequence);
}

void store_d_scores(const MarginalLossParams& params, int64_t b, const Vec* values) {
  store(params.d_scores, loss_type(params), b * params.documents, params.documents,
        reinterpret_cast<const double*>(values), 1);
}

void sequence_backward(const MarginalLossParams& params, int64_t b, Columns& c) {
  const int64_t vectors = vectors_of(params.documents);
  load_sequence(params, b, c) ? residuals(c, vectors) : nothing(c, vectors);
  const Vec g = splat(upstream(params, b));
  for (int64_t v = 0; v < vectors; ++v) {
    c.d_relevance[v] = gradient(g, as_kept(params, c.d_relevance[v]));
    c.shifted[v] = gradient(g, as_kept(params, c.shifted[v]));
  }
  if (params.d_scores != nullptr) store_d_scores(params, b, c.d_relevance);
  if (params.d_log_likelihood != nullptr) {
    spread_over_tokens(params, b, reinterpret_cast<const double*>(c.shifted));
  }
}

// Mode "token": tokens m .. m + lanes - 1 of example b, one a lane. Loads them and returns which are scored.
Mask load_tokens(const MarginalLossParams& params, int64_t b, int64_t m, int lanes, const Columns& c) {
  alignas(64) int64_t scored[kLanes];
  for (int j = 0; j < kLanes; ++j)
    scored[j] = c.prior.exists && j < lanes && is_scored(params, b, m + j) ? -1 : 0;
  const int64_t first = b * params.stride_b + m * params.stride_m;
  for (int64_t k = 0; k < params.documents; ++k) {
    c.log_likelihood[k] =
        load_lanes(params.log_likelihood, first + k * params.stride_k, params.stride_m, lanes);
  }
  Mask result;
  memcpy(&result, scored, sizeof result);
  return result;
}

int lanes_from(int64_t first, int64_t end) {
  return static_cast<int>(end - first < kLanes ? end - first : kLanes);
}

// Mode "token": r of tokens m .. m + lanes - 1 added to c.d_relevance and their posteriors in c.shifted, 0
// where they pull nothing; both as in residuals().
void token_residuals(const MarginalLossParams& params, const Columns& c, const Centre& centre, Mask scored) {
  const Mask pulls = scored & ~centre.impossible;
  for (int64_t k = 0; k < params.documents; ++k) {
    const Shifted s = posterior_of<false>(c, k, centre);
    c.d_relevance[k] += pulls ? s.change : splat(0.0);
    c.shifted[k] = pulls ? s.joint : splat(0.0);
  }
}

void sum_lanes(const MarginalLossParams& params, const Columns& c) {
  auto* const sums = reinterpret_cast<double*>(c.d_relevance);
  for (int64_t k = 0; k < params.documents; ++k) sums[k] = sum_of(c.d_relevance[k]);
}

void token_forward(const MarginalLossParams& params, int64_t b, Columns& c) {
  const bool keeps = params.kept_residual != nullptr || params.kept_posterior != nullptr;
  load_prior(params, b, c);
  Vec loss = splat(0.0);
  Mask count{};  // of -1 each
  for (int64_t k = 0; k < params.documents && keeps; ++k) c.d_relevance[k] = splat(0.0);
  for (int64_t m = 0; m < params.tokens; m += kLanes) {
    const int lanes = lanes_from(m, params.tokens);
    const Mask scored = load_tokens(params, b, m, lanes, c);
    const Centre centre = centre_columns<false>(params.documents, c);
    loss -= scored ? log_marginal(c, centre) : splat(0.0);
    count += scored;
    if (keeps) token_residuals(params, c, centre, scored);
    for (int64_t k = 0; k < params.documents && params.kept_posterior != nullptr; ++k) {
      store_lanes(params.kept_posterior, loss_type(params), (b * params.documents + k) * params.tokens + m,
                  lanes, c.shifted[k]);
    }
  }
  params.example_loss[b] = sum_of(loss);
  params.example_count[b] = 0;
  for (int j = 0; j < kLanes; ++j) params.example_count[b] -= count[j];
  if (params.kept_residual != nullptr) {
    sum_lanes(params, c);
    keep_residual(params, b, c.d_relevance);
  }
}

void token_backward(const MarginalLossParams& params, int64_t b, Columns& c) {
  load_prior(params, b, c);
  const Vec g = splat(upstream(params, b));
  for (int64_t k = 0; k < params.documents; ++k) c.d_relevance[k] = splat(0.0);
  for (int64_t m = 0; m < params.tokens; m += kLanes) {
    const int lanes = lanes_from(m, params.tokens);
    const Mask scored = load_tokens(params, b, m, lanes, c);
    token_residuals(params, c, centre_columns<false>(params.documents, c), scored);
    for (int64_t k = 0; k < params.documents && params.d_log_likelihood != nullptr; ++k) {
      store_lanes(params.d_log_likelihood, params.log_likelihood.type,
                  (b * params.documents + k) * params.tokens + m, lanes,
                  gradient(g, as_kept(params, c.shifted[k])));
    }
  }
  if (params.d_scores != nullptr) {
    sum_lanes(params, c);
    const int64_t vectors = vectors_of(params.documents);
    for (int64_t v = 0; v < vectors; ++v) {
      c.d_relevance[v] = gradient(g, as_kept(params, c.d_relevance[v]));
    }
    store_d_scores(params, b, c.d_relevance);
  }
}

// Vectors of documents, and vectors of columns a document in mode "token".
constexpr int kPriorArrays = 2, kColumnArrays = 3;

int64_t workspace(int64_t documents, bool per_token) {
  const int64_t vectors = vectors_of(documents);
  return kLanes * (kPriorArrays * vectors + kColumnArrays * (per_token ? documents : vectors));
}

Columns columns_in(double* memory, int64_t documents, bool per_token) {
  const int64_t vectors = vectors_of(documents), columns = per_token ? documents : vectors;
  Vec* const prior = reinterpret_cast<Vec*>(memory);
  Vec* const first = prior + kPriorArrays * vectors;
  return {{prior, prior + vectors, 1.0, false}, first, first + columns, first + 2 * columns, Vec{}};
}

void forward(const MarginalLossParams& params, int64_t begin, int64_t end, double* memory) {
  Columns c = columns_in(memory, params.documents, params.per_token);
  for (int64_t b = begin; b < end; ++b) {
    (params.per_token ? token_forward : sequence_forward)(params, b, c);
  }
}

void backward(const MarginalLossParams& params, int64_t begin, int64_t end, double* memory) {
  Columns c = columns_in(memory, params.documents, params.per_token);
  const bool kept = params.kept_residual != nullptr || params.kept_posterior != nullptr;
  const auto run = kept ? kept_backward : params.per_token ? token_backward : sequence_backward;
  for (int64_t b = begin; b < end; ++b) run(params, b, c);
}

const MarginalLossKernels kKernels{&workspace, &forward, &backward};

}  // namespace
}  // namespace realm_kernels
