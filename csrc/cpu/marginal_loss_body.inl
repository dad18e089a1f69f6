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

// -g x value where it counts. Selected, not multiplied: an infinite g times zero would be NaN.
inline Vec gradient(Mask counts, Vec g, Vec value) {
  return (counts & (value != 0.0)) ? -g * value : splat(0.0);
}

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

// r to c.d_relevance and the posterior to c.shifted, or 0 of both where nothing is pulled. Both, whoever asks
// for them: a posterior that only the residual needed would be fused into the residual's subtraction, and the
// bits of d_scores would depend on which gradients are wanted.
void residuals(const Columns& c, int64_t vectors, const Centre& centre) {
  const bool counts = !centre.impossible[0];
  for (int64_t v = 0; v < vectors; ++v) {
    const Shifted s = counts ? posterior_of<true>(c, v, centre) : Shifted{};
    c.d_relevance[v] = s.change;
    c.shifted[v] = s.joint;
  }
}

double* kept_of(const MarginalLossParams& params, int64_t b, int array) {
  return params.kept + (array * params.batch + b) * params.documents;
}

void sequence_forward(const MarginalLossParams& params, int64_t b, Columns& c) {
  const int64_t vectors = vectors_of(params.documents);
  const bool scored = load_sequence(params, b, c);
  params.example_count[b] = scored ? 1 : 0;
  params.example_loss[b] = 0.0;
  if (scored) {
    const Centre centre = centre_columns<true>(vectors, c);
    params.example_loss[b] = -log_marginal(c, centre)[0];
    if (params.kept != nullptr) residuals(c, vectors, centre);
  }
  if (params.kept != nullptr) {
    const Vec* const arrays[2] = {c.d_relevance, c.shifted};
    for (int i = 0; i < 2; ++i) {
      const size_t bytes = params.documents * sizeof(double);
      scored ? memcpy(kept_of(params, b, i), arrays[i], bytes) : memset(kept_of(params, b, i), 0, bytes);
    }
  }
}

void store_d_scores(const MarginalLossParams& params, int64_t b, const double* values) {
  const FloatType type = params.wide ? FloatType::kFloat64 : FloatType::kFloat32;
  store(params.d_scores, type, b * params.documents, params.documents, values, 1);
}

void sequence_backward(const MarginalLossParams& params, int64_t b, Columns& c) {
  const int64_t vectors = vectors_of(params.documents);
  if (params.kept != nullptr) {
    const size_t bytes = params.documents * sizeof(double);
    memcpy(c.d_relevance, kept_of(params, b, 0), bytes);
    memcpy(c.shifted, kept_of(params, b, 1), bytes);
  } else if (load_sequence(params, b, c)) {
    residuals(c, vectors, centre_columns<true>(vectors, c));
  } else {
    for (int64_t v = 0; v < vectors; ++v) c.d_relevance[v] = c.shifted[v] = splat(0.0);
  }
  const Vec g = splat(upstream(params, b));
  for (int64_t v = 0; v < vectors; ++v) {
    c.d_relevance[v] = gradient(~Mask{}, g, c.d_relevance[v]);
    c.shifted[v] = gradient(~Mask{}, g, c.shifted[v]);
  }
  if (params.d_scores != nullptr) {
    store_d_scores(params, b, reinterpret_cast<const double*>(c.d_relevance));
  }
  if (params.d_log_likelihood != nullptr) {
    spread_over_tokens(params, b, reinterpret_cast<const double*>(c.shifted));
  }
}

// Mode "token": tokens m .. m + lanes - 1 of example b, one a lane. Loads them and returns which are scored.
Mask load_tokens(const MarginalLossParams& params, int64_t b, int64_t m, int lanes, const Columns& c) {
  alignas(64) int64_t scored[kLanes];
  for (int j = 0; j < kLanes; ++j) scored[j] = j < lanes && is_scored(params, b, m + j) ? -1 : 0;
  const int64_t first = b * params.stride_b + m * params.stride_m;
  for (int64_t k = 0; k < params.documents; ++k) {
    c.log_likelihood[k] = load_lanes(params.log_likelihood, first + k * params.stride_k, params.stride_m, lanes);
  }
  Mask result;
  memcpy(&result, scored, sizeof result);
  return result;
}

int lanes_from(int64_t first, int64_t end) {
  return static_cast<int>(end - first < kLanes ? end - first : kLanes);
}

void token_forward(const MarginalLossParams& params, int64_t b, Columns& c) {
  load_prior(params, b, c);
  Vec loss = splat(0.0);
  Mask count{};  // of -1 each
  for (int64_t m = 0; m < params.tokens && c.prior.exists; m += kLanes) {
    const Mask scored = load_tokens(params, b, m, lanes_from(m, params.tokens), c);
    const Vec log_likelihood = log_marginal(c, centre_columns<false>(params.documents, c));
    loss -= scored ? log_likelihood : splat(0.0);
    count += scored;
  }
  params.example_loss[b] = sum_of(loss);
  params.example_count[b] = 0;
  for (int j = 0; j < kLanes; ++j) params.example_count[b] -= count[j];
}

void token_backward(const MarginalLossParams& params, int64_t b, Columns& c) {
  load_prior(params, b, c);
  const Vec g = splat(upstream(params, b));
  for (int64_t k = 0; k < params.documents; ++k) c.d_relevance[k] = splat(0.0);
  for (int64_t m = 0; m < params.tokens; m += kLanes) {
    const int lanes = lanes_from(m, params.tokens);
    const Mask scored = load_tokens(params, b, m, lanes, c);
    const Centre centre = centre_columns<false>(params.documents, c);
    const Mask counts = scored & ~centre.impossible;
    for (int64_t k = 0; k < params.documents; ++k) {
      const Shifted s = posterior_of<false>(c, k, centre);
      c.d_relevance[k] += gradient(counts, g, s.change);
      c.shifted[k] = gradient(counts, g, s.joint);  // whoever asks for it, as in residuals()
    }
    for (int64_t k = 0; k < params.documents && params.d_log_likelihood != nullptr; ++k) {
      store_lanes(params.d_log_likelihood, params.log_likelihood.type,
                  (b * params.documents + k) * params.tokens + m, lanes, c.shifted[k]);
    }
  }
  if (params.d_scores != nullptr) {
    auto* const d_scores = reinterpret_cast<double*>(c.d_relevance);
    for (int64_t k = 0; k < params.documents; ++k) d_scores[k] = sum_of(c.d_relevance[k]);
    store_d_scores(params, b, d_scores);
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
  return {{prior, prior + vectors, 1.0, false}, first, first + columns, first + 2 * columns};
}

void forward(const MarginalLossParams& params, int64_t begin, int64_t end, double* memory) {
  Columns c = columns_in(memory, params.documents, params.per_token);
  for (int64_t b = begin; b < end; ++b) {
    (params.per_token ? token_forward : sequence_forward)(params, b, c);
  }
}

void backward(const MarginalLossParams& params, int64_t begin, int64_t end, double* memory) {
  Columns c = columns_in(memory, params.documents, params.per_token);
  for (int64_t b = begin; b < end; ++b) {
    (params.per_token ? token_backward : sequence_backward)(params, b, c);
  }
}

const MarginalLossKernels kKernels{&workspace, &forward, &backward};

}  // namespace
}  // namespace realm_kernels
