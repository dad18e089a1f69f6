// The body of marginal_loss, compiled once for each instruction set with kLanes doubles to a vector: how the
// columns of the two modes become lanes, what is read and what is written. Log-likelihoods are read once.
//
// Nothing here may be shared with another translation unit (no std templates): the linker might keep the copy
// for an instruction set this processor lacks.
#include <string.h>

#include "cpu/marginal_loss_columns.inl"
#include "cpu/marginal_loss_float.inl"
#include "cpu/marginal_loss_kernels.h"

namespace realm_kernels {
namespace {

// Documents that are converted at a time, in a buffer on the stack.
constexpr int kChunk = 32;

int chunk_from(int64_t first, int64_t end) {
  return static_cast<int>(end - first < kChunk ? end - first : kChunk);
}

// s_k + log w_k of example b into lane j (or every lane, where j < 0), -inf where masked.
void load_relevance(const MarginalLossParams& params, int64_t b, int j, Vec* out) {
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
      const double u = there ? scores[i] : -kInfinity;
      if (j < 0) {
        out[first + i] = splat(u);
      } else {
        out[first + i][j] = u;
      }
    }
  }
}

bool is_scored(const MarginalLossParams& params, int64_t b, int64_t m) {
  return params.token_mask == nullptr || params.token_mask[b * params.tokens + m];
}

bool any_scored(const MarginalLossParams& params, int64_t b) {
  for (int64_t m = 0; m < params.tokens; ++m) {
    if (is_scored(params, b, m)) return true;
  }
  return false;
}

// sum_m c_m l_km of example b for `count` documents from `first` on.
void sum_tokens(const MarginalLossParams& params, int64_t b, int64_t first, int count, double* sums) {
  double values[kChunk];
  for (int i = 0; i < count; ++i) sums[i] = 0.0;
  for (int64_t m = 0; m < params.tokens; ++m) {
    if (!is_scored(params, b, m)) continue;
    load(params.log_likelihood, b * params.stride_b + first * params.stride_k + m * params.stride_m,
         params.stride_k, count, values);
    for (int i = 0; i < count; ++i) sums[i] += values[i];
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

// log p(y|x) of lane j.
double log_marginal(const Centre& centre, int j) {
  return centre.impossible[j] ? -kInfinity : centre.log_likelihood[j] + centre.relative[j];
}

// Mode "sequence": examples b .. b + lanes - 1, one a lane. Loads them and returns which are scored.
Mask load_sequences(const MarginalLossParams& params, int64_t b, int lanes, const Columns& c) {
  if (lanes < kLanes) {
    for (int64_t k = 0; k < params.documents; ++k) c.log_prior[k] = splat(-kInfinity);
  }
  Mask scored{};
  for (int j = 0; j < lanes; ++j) {
    load_relevance(params, b + j, j, c.log_prior);
    scored[j] = any_scored(params, b + j) ? -1 : 0;
  }
  scored &= normalise(params.documents, c);
  double sums[kChunk];
  for (int64_t k = 0; k < params.documents; ++k) c.log_likelihood[k] = splat(-kInfinity);
  for (int j = 0; j < lanes; ++j) {
    for (int64_t first = 0; first < params.documents && scored[j]; first += kChunk) {
      const int count = chunk_from(first, params.documents);
      sum_tokens(params, b + j, first, count, sums);
      for (int i = 0; i < count; ++i) {
        // What a masked document holds is read, but never looked at.
        const bool masked = c.log_prior[first + i][j] == -kInfinity;
        c.log_likelihood[first + i][j] = masked ? -kInfinity : sums[i];
      }
    }
  }
  return scored;
}

void sequence_forward(const MarginalLossParams& params, int64_t b, int lanes, const Columns& c) {
  const Mask scored = load_sequences(params, b, lanes, c);
  const Centre centre = centre_columns(params.documents, c);
  for (int j = 0; j < lanes; ++j) {
    params.example_loss[b + j] = scored[j] ? -log_marginal(centre, j) : 0.0;
    params.example_count[b + j] = scored[j] ? 1 : 0;
  }
}

// d_scores[b] and d_log_likelihood[b] of mode "sequence", the latter one value for every scored token.
void store_sequence(const MarginalLossParams& params, int64_t b, int j, const Columns& c) {
  const double zeros[kChunk] = {};
  double values[kChunk];
  for (int64_t first = 0; first < params.documents; first += kChunk) {
    const int count = chunk_from(first, params.documents);
    const int64_t row = b * params.documents + first;
    if (params.d_scores != nullptr) {
      for (int i = 0; i < count; ++i) values[i] = c.d_relevance[first + i][j];
      store(params.d_scores, params.wide ? FloatType::kFloat64 : FloatType::kFloat32, row, 1, count, values);
    }
    if (params.d_log_likelihood != nullptr) {
      for (int i = 0; i < count; ++i) values[i] = c.log_likelihood[first + i][j];
      for (int64_t m = 0; m < params.tokens; ++m) {
        store(params.d_log_likelihood, params.log_likelihood.type, row * params.tokens + m, params.tokens,
              count, is_scored(params, b, m) ? values : zeros);
      }
    }
  }
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
  for (int j = 0; j < lanes; ++j) store_sequence(params, b + j, j, c);
}

// Mode "token": tokens m .. m + lanes - 1 of example b, one a lane. Loads them and returns which are scored.
Mask load_tokens(const MarginalLossParams& params, int64_t b, int64_t m, int lanes, const Columns& c) {
  Mask scored{};
  for (int j = 0; j < lanes; ++j) scored[j] = is_scored(params, b, m + j) ? -1 : 0;
  double values[kLanes] = {};
  for (int64_t k = 0; k < params.documents; ++k) {
    if (c.log_prior[k][0] == -kInfinity) {
      c.log_likelihood[k] = splat(-kInfinity);
      continue;
    }
    load(params.log_likelihood, b * params.stride_b + k * params.stride_k + m * params.stride_m,
         params.stride_m, lanes, values);
    memcpy(&c.log_likelihood[k], values, sizeof values);
  }
  return scored;
}

int lanes_from(int64_t first, int64_t end) {
  return static_cast<int>(end - first < kLanes ? end - first : kLanes);
}

void token_forward(const MarginalLossParams& params, int64_t b, const Columns& c) {
  load_relevance(params, b, -1, c.log_prior);
  const Mask there = normalise(params.documents, c);
  double loss = 0.0;
  int64_t count = 0;
  for (int64_t m = 0; m < params.tokens; m += kLanes) {
    const int lanes = lanes_from(m, params.tokens);
    const Mask scored = load_tokens(params, b, m, lanes, c) & there;
    const Centre centre = centre_columns(params.documents, c);
    for (int j = 0; j < lanes; ++j) {
      loss -= scored[j] ? log_marginal(centre, j) : 0.0;
      count += scored[j] ? 1 : 0;
    }
  }
  params.example_loss[b] = loss;
  params.example_count[b] = count;
}

void token_backward(const MarginalLossParams& params, int64_t b, const Columns& c) {
  load_relevance(params, b, -1, c.log_prior);
  const Mask there = normalise(params.documents, c);
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
      if (params.d_log_likelihood != nullptr) {
        const Vec d_log_likelihood = gradient(counts, g, s.joint);
        double values[kLanes];
        memcpy(values, &d_log_likelihood, sizeof values);
        store(params.d_log_likelihood, params.log_likelihood.type,
              (b * params.documents + k) * params.tokens + m, 1, lanes, values);
      }
    }
  }
  double values[kChunk];
  for (int64_t first = 0; first < params.documents && params.d_scores != nullptr; first += kChunk) {
    const int count = chunk_from(first, params.documents);
    for (int i = 0; i < count; ++i) values[i] = sum_of(c.d_relevance[first + i]);
    store(params.d_scores, params.wide ? FloatType::kFloat64 : FloatType::kFloat32,
          b * params.documents + first, 1, count, values);
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
