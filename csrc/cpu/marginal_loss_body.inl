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

// s_k + log w_k of example b to out[k * stride], -inf where masked.
void load_relevance(const MarginalLossParams& params, int64_t b, int64_t stride, double* out) {
  double scores[kChunk], log_weight[kChunk];
  for (int64_t first = 0; first < params.documents; first += kChunk) {
    const int count = chunk_from(first, params.documents);
    const int64_t offset = b * params.documents + first;
    load(params.scores, offset, 1, count, scores);
    if (params.log_weight.data != nullptr) {
      load(params.log_weight, offset, 1, count, log_weight);
      for (int i = 0; i < count; ++i) scores[i] += log_weight[i];
    }
    for (int i = 0; i < count; ++i) {
      const bool there = params.doc_mask == nullptr || params.doc_mask[offset + i];
      out[(first + i) * stride] = there ? scores[i] : -kInfinity;
    }
  }
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

// Mode "sequence": examples b .. b + lanes - 1, one a lane. Loads them and returns which are scored.
Mask load_sequences(const MarginalLossParams& params, int64_t b, int lanes, const Columns& c) {
  auto* const log_prior = reinterpret_cast<double*>(c.log_prior);
  auto* const log_likelihood = reinterpret_cast<double*>(c.log_likelihood);
  if (lanes < kLanes) {
    for (int64_t k = 0; k < params.documents; ++k) {
      c.log_prior[k] = c.log_likelihood[k] = splat(-kInfinity);
    }
  }
  Mask scored{};
  for (int j = 0; j < lanes; ++j) {
    load_relevance(params, b + j, kLanes, log_prior + j);
    scored[j] = any_scored(params, b + j) ? -1 : 0;
    // What a masked document holds is read, but never looked at.
    sum_tokens(params, b + j, kLanes, log_likelihood + j);
  }
  scored &= normalise<false>(params.documents, c.log_prior, c.prior);
  for (int64_t k = 0; k < params.documents; ++k) {
    c.log_likelihood[k] = (scored & (c.log_prior[k] != -kInfinity)) ? c.log_likelihood[k] : splat(-kInfinity);
  }
  return scored;
}

void sequence_forward(const MarginalLossParams& params, int64_t b, int lanes, const Columns& c) {
  const Mask scored = load_sequences(params, b, lanes, c);
  const Vec loss = -log_marginal(centre_columns(params.documents, c));
  for (int j = 0; j < lanes; ++j) {
    params.example_loss[b + j] = scored[j] ? loss[j] : 0.0;
    params.example_count[b + j] = scored[j] ? 1 : 0;
  }
}

void store_d_scores(const MarginalLossParams& params, int64_t b, int64_t stride, const double* values) {
  const FloatType type = params.wide ? FloatType::kFloat64 : FloatType::kFloat32;
  store(params.d_scores, type, b * params.documents, params.documents, values, stride);
}

void sequence_backward(const MarginalLossParams& params, int64_t b, int lanes, const Columns& c) {
  const Mask scored = load_sequences(params, b, lanes, c);
  const Centre centre = centre_columns(params.documents, c);
  const Mask counts = scored & ~centre.impossible;
  Vec g{};
  for (int j = 0; j < lanes; ++j) g[j] = upstream(params, b + j);
  for (int64_t k = 0; k < params.documents; ++k) {
    const Shifted s = posterior_of(c, k, centre);
    c.d_relevance[k] = gradient(counts, g, s.change);
    c.log_likelihood[k] = gradient(counts, g, s.joint);  // its place is free now
  }
  for (int j = 0; j < lanes; ++j) {
    if (params.d_scores != nullptr) {
      store_d_scores(params, b + j, kLanes, reinterpret_cast<const double*>(c.d_relevance) + j);
    }
    if (params.d_log_likelihood != nullptr) {
      spread_over_tokens(params, b + j, kLanes, reinterpret_cast<const double*>(c.log_likelihood) + j);
    }
  }
}

// Mode "token": the prior of example b, the same in every lane. Returns where there is any document: in all
// lanes or in none.
Mask load_prior(const MarginalLossParams& params, int64_t b, const Columns& c) {
  // Documents fill the lanes of the softmax; two arrays that are free still hold them.
  const int64_t vectors = (params.documents + kLanes - 1) / kLanes;
  auto* const log_prior = reinterpret_cast<double*>(c.log_likelihood);
  const auto* const prior = reinterpret_cast<const double*>(c.shifted);
  c.log_likelihood[vectors - 1] = splat(-kInfinity);
  load_relevance(params, b, 1, log_prior);
  const Mask there = normalise<true>(vectors, c.log_likelihood, c.shifted);
  for (int64_t k = 0; k < params.documents; ++k) {
    c.log_prior[k] = splat(log_prior[k]);
    c.prior[k] = splat(prior[k]);
  }
  return there;
}

// Mode "token": tokens m .. m + lanes - 1 of example b, one a lane. Loads them and returns which are scored.
Mask load_tokens(const MarginalLossParams& params, int64_t b, int64_t m, int lanes, const Columns& c) {
  Mask scored{};
  for (int j = 0; j < lanes; ++j) scored[j] = is_scored(params, b, m + j) ? -1 : 0;
  const int64_t first = b * params.stride_b + m * params.stride_m;
  for (int64_t k = 0; k < params.documents; ++k) {
    const Vec values = load_lanes(params.log_likelihood, first + k * params.stride_k, params.stride_m, lanes);
    c.log_likelihood[k] = c.log_prior[k] == -kInfinity ? splat(-kInfinity) : values;
  }
  return scored;
}

int lanes_from(int64_t first, int64_t end) {
  return static_cast<int>(end - first < kLanes ? end - first : kLanes);
}

void token_forward(const MarginalLossParams& params, int64_t b, const Columns& c) {
  const Mask there = load_prior(params, b, c);
  double loss = 0.0;
  int64_t count = 0;
  for (int64_t m = 0; m < params.tokens; m += kLanes) {
    const int lanes = lanes_from(m, params.tokens);
    const Mask scored = load_tokens(params, b, m, lanes, c) & there;
    const Vec log_likelihood = log_marginal(centre_columns(params.documents, c));
    for (int j = 0; j < lanes; ++j) {
      loss -= scored[j] ? log_likelihood[j] : 0.0;
      count += scored[j] ? 1 : 0;
    }
  }
  params.example_loss[b] = loss;
  params.example_count[b] = count;
}

void token_backward(const MarginalLossParams& params, int64_t b, const Columns& c) {
  const Mask there = load_prior(params, b, c);
  const Vec g = splat(upstream(params, b));
  for (int64_t k = 0; k < params.documents; ++k) c.d_relevance[k] = splat(0.0);
  for (int64_t m = 0; m < params.tokens; m += kLanes) {
    const int lanes = lanes_from(m, params.tokens);
    const Mask scored = load_tokens(params, b, m, lanes, c) & there;
    const Centre centre = centre_columns(params.documents, c);
    const Mask counts = scored & ~centre.impossible;
    for (int64_t k = 0; k < params.documents; ++k) {
      const Shifted s = posterior_of(c, k, centre);
      c.d_relevance[k] += gradient(counts, g, s.change);
      // Kept whoever asks for it: a posterior that only the residual needed would be fused into the
      // residual's subtraction, and the bits of d_scores would depend on which gradients are wanted.
      c.shifted[k] = gradient(counts, g, s.joint);
    }
    for (int64_t k = 0; k < params.documents && params.d_log_likelihood != nullptr; ++k) {
      store_lanes(params.d_log_likelihood, params.log_likelihood.type,
                  (b * params.documents + k) * params.tokens + m, lanes, c.shifted[k]);
    }
  }
  if (params.d_scores != nullptr) {
    auto* const d_scores = reinterpret_cast<double*>(c.d_relevance);
    for (int64_t k = 0; k < params.documents; ++k) d_scores[k] = sum_of(c.d_relevance[k]);
    store_d_scores(params, b, 1, d_scores);
  }
}

int64_t workspace(int64_t documents) { return kArrays * kLanes * documents; }

void forward(const MarginalLossParams& params, int64_t begin, int64_t end, double* memory) {
  const Columns c = columns_in(memory, params.documents);
  for (int64_t b = begin; b < end; b += params.per_token ? 1 : kLanes) {
    if (params.per_token) {
      token_forward(params, b, c);
    } else {
      sequence_forward(params, b, lanes_from(b, end), c);
    }
  }
}

void backward(const MarginalLossParams& params, int64_t begin, int64_t end, double* memory) {
  const Columns c = columns_in(memory, params.documents);
  for (int64_t b = begin; b < end; b += params.per_token ? 1 : kLanes) {
    if (params.per_token) {
      token_backward(params, b, c);
    } else {
      sequence_backward(params, b, lanes_from(b, end), c);
    }
  }
}

const MarginalLossKernels kKernels{kLanes, &workspace, &forward, &backward};

}  // namespace
}  // namespace realm_kernels
