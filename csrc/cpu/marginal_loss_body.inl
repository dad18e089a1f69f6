// The body of marginal_loss, compiled once for each instruction set with kLanes doubles to a vector: how the
// columns of the two modes become lanes, what is read and what is written. Each pass reads the
// log-likelihoods once.
//
// Nothing here may be shared with another translation unit (no std templates): the linker might keep the copy
// for an instruction set this processor lacks. What gives bits that both roads of a backward must share, from
// what was kept and from the inputs, is a function of its own: inlined twice, it could be fused in two ways.
#include <string.h>

#include "cpu/marginal_loss_columns.inl"
#include "cpu/marginal_loss_float.inl"
#include "cpu/marginal_loss_kernels.h"
#include "cpu/marginal_loss_rows.inl"

#define REALM_KERNELS_ONE_COPY __attribute__((noinline))

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

// The type of the loss, its gradient to scores, and of documents that are kept.
FloatType loss_type(const MarginalLossParams& params) {
  return params.wide ? FloatType::kFloat64 : FloatType::kFloat32;
}

int64_t vectors_of(int64_t count) { return (count + kLanes - 1) / kLanes; }

int lanes_from(int64_t first, int64_t end) {
  return static_cast<int>(end - first < kLanes ? end - first : kLanes);
}

// `count` numbers of a row from vectors that hold them.
void store_vectors(void* data, FloatType type, int64_t offset, int64_t count, const Vec* values) {
  for (int64_t first = 0; first < count; first += kLanes) {
    store_lanes(data, type, offset + first, lanes_from(first, count), values[first / kLanes]);
  }
}

// What the forward leaves of an example's columns: shift and Z of the prior, then each field of all columns.
double* kept_columns(const MarginalLossParams& params, int64_t b, int64_t columns) {
  return params.kept_columns == nullptr ? nullptr : params.kept_columns + b * (2 + kColumnFields * columns);
}

// Mode "token": columns [m, m + kLanes) of the rounded number.
void keep_columns(double* kept, int64_t columns, int64_t m, const Column& column) {
  double* const at = kept + 2 + m;
  memcpy(at, &column.log_likelihood, sizeof(Vec));
  memcpy(at + columns, &column.sum, sizeof(Vec));
  memcpy(at + 2 * columns, &column.share, sizeof(Vec));
  memcpy(at + 3 * columns, &column.unit, sizeof(Vec));
}

Column columns_kept(const double* kept, int64_t columns, int64_t m) {
  const double* const at = kept + 2 + m;
  return {widened(at), widened(at + columns), widened(at + 2 * columns), widened(at + 3 * columns)};
}

// Scratch of a thread. Mode "sequence": documents in the lanes. Mode "token": a vector of tokens a document.
struct Scratch {
  Prior prior;
  Vec* log_likelihood;
  Vec* d_relevance;  // mode "token": one sum a lane
};

// ---- Mode "sequence" ----

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

// The prior and the one column of what was loaded.
REALM_KERNELS_ONE_COPY Column sequence_column(int64_t vectors, Scratch& s, Marginal* marginal) {
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
    total += mass;
    sums.joint += terms.joint;
    sums.change += terms.change;
  }
  finish_prior(largest, sum_of(total), s.prior);
  sums = {splat(sum_of(sums.joint)), splat(sum_of(sums.change))};
  return finish_column(s.prior, best, sums, marginal, [&](const Column& column) {
    Vec joint = splat(0.0);
    for (int64_t v = 0; v < vectors; ++v) {
      joint += deep_joint(s.prior.relevance[v], column, s.log_likelihood[v] - column.log_likelihood);
    }
    return splat(sum_of(joint));
  });
}

// What was loaded becomes results, given to sink(v, result) vector by vector.
template <class Sink>
inline void sequence_results(const MarginalLossParams& params, Scratch& s, const Column& column,
                             const Sink& sink) {
  const int64_t vectors = vectors_of(params.documents);
  if (!pulls(column)[0]) {
    for (int64_t v = 0; v < vectors; ++v) sink(v, Result{splat(0.0), splat(0.0)});
    return;
  }
  const Kind kind = kind_of(column);
  for (int64_t v = 0; v < vectors; ++v) {
    const Vec relevance = s.prior.relevance[v], mass = mass_of(relevance, s.prior.shift);
    sink(v, result_of(s.prior, relevance, mass, s.log_likelihood[v], column, kind));
  }
}

// r takes the place of the relevance, the posterior that of the log-likelihoods.
REALM_KERNELS_ONE_COPY void results_in_place(const MarginalLossParams& params, Scratch& s,
                                             const Column& column) {
  sequence_results(params, s, column, [&](int64_t v, const Result& result) {
    s.prior.relevance[v] = result.residual;
    s.log_likelihood[v] = result.posterior;
  });
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

void sequence_forward(const MarginalLossParams& params, int64_t b, Scratch& s, Pending& pending) {
  const int64_t vectors = vectors_of(params.documents), first = b * params.documents;
  Marginal marginal{splat(0.0), splat(0.0), splat(1.0), splat(0.0)};
  Column column{};
  const bool any = any_scored(params, b);
  if (any) {
    load_sequence(params, b, s);
    column = sequence_column(vectors, s, &marginal);
  }
  params.example_count[b] = any && s.prior.exists ? 1 : 0;
  pending.add(marginal);
  if (double* const kept = kept_columns(params, b, 1)) {
    const double fields[2 + kColumnFields] = {s.prior.shift, s.prior.total,   column.log_likelihood[0],
                                              column.sum[0], column.share[0], column.unit[0]};
    memcpy(kept, fields, sizeof fields);
  }
  if (params.kept_residual == nullptr && params.kept_posterior == nullptr) return;
  results_in_place(params, s, column);
  if (params.kept_residual != nullptr) {
    store_vectors(params.kept_residual, loss_type(params), first, params.documents, s.prior.relevance);
  }
  if (params.kept_posterior != nullptr) {
    store_vectors(params.kept_posterior, loss_type(params), first, params.documents, s.log_likelihood);
  }
}

// The column of example b, from what was kept or from its documents, which are loaded if it pulls.
Column sequence_again(const MarginalLossParams& params, int64_t b, Scratch& s) {
  Column column{};
  if (const double* const kept = kept_columns(params, b, 1)) {
    column = {splat(kept[2]), splat(kept[3]), splat(kept[4]), splat(kept[5])};
    s.prior.shift = kept[0];
    s.prior.inverse = 1.0 / kept[1];
    if (pulls(column)[0]) load_sequence(params, b, s);
  } else if (any_scored(params, b)) {
    load_sequence(params, b, s);
    Marginal unused;
    column = sequence_column(vectors_of(params.documents), s, &unused);
  }
  return column;
}

// The numbers of a row, of the type of the loss, in the scratch.
void load_kept(const MarginalLossParams& params, int64_t b, const void* kept, Vec* out) {
  if (kept == nullptr) return;
  load({kept, loss_type(params)}, b * params.documents, 1, params.documents, reinterpret_cast<double*>(out));
}

// Gradients of one token, float32, go to memory as they are found.
void one_token_backward(const MarginalLossParams& params, int64_t b, Scratch& s) {
  const int64_t first = b * params.documents;
  float* const d_scores = static_cast<float*>(params.d_scores) + first;
  float* const d_log_likelihood = static_cast<float*>(params.d_log_likelihood) + first;
  const Vec g = splat(upstream(params, b));
  sequence_results(params, s, sequence_again(params, b, s), [&](int64_t v, const Result& result) {
    const int64_t k = v * kLanes;
    const int lanes = lanes_from(k, params.documents);
    store_floats(d_scores + k, lanes, gradient(g, result.residual));
    store_floats(d_log_likelihood + k, lanes, gradient(g, result.posterior));
  });
}

void sequence_backward(const MarginalLossParams& params, int64_t b, Scratch& s) {
  const bool kept = params.kept_residual != nullptr || params.kept_posterior != nullptr;
  if (params.tokens == 1 && !kept && !params.wide && params.log_likelihood.type == FloatType::kFloat32 &&
      params.d_scores != nullptr && params.d_log_likelihood != nullptr) {
    return one_token_backward(params, b, s);
  }
  Vec* const residual = s.prior.relevance;
  Vec* const posterior = s.log_likelihood;
  if (kept) {
    load_kept(params, b, params.kept_residual, residual);
    load_kept(params, b, params.kept_posterior, posterior);
  } else {
    results_in_place(params, s, sequence_again(params, b, s));
  }
  const Vec g = splat(upstream(params, b));
  // Documents are kept of several tokens, and then rounded: who finds them again rounds them too, so that
  // both have the same bits.
  const bool rounds = params.tokens > 1 && !params.wide;
  for (int64_t v = 0; v < vectors_of(params.documents); ++v) {
    residual[v] = gradient(g, rounds ? rounded(residual[v]) : residual[v]);
    posterior[v] = gradient(g, rounds ? rounded(posterior[v]) : posterior[v]);
  }
  if (params.d_scores != nullptr) {
    store_vectors(params.d_scores, loss_type(params), b * params.documents, params.documents, residual);
  }
  if (params.d_log_likelihood == nullptr) return;
  if (params.tokens == 1) {  // where it is not scored, the values are zero
    store_vectors(params.d_log_likelihood, params.log_likelihood.type, b * params.documents, params.documents,
                  posterior);
  } else {
    spread_over_tokens(params, b, reinterpret_cast<const double*>(posterior));
  }
}

// ---- Mode "token" ----

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

// Tokens m .. m + lanes - 1 of example b, one a lane. Loads them and returns which are scored. What a masked
// document holds is not looked at.
Mask load_tokens(const MarginalLossParams& params, int64_t b, int64_t m, int lanes, const Scratch& s) {
  alignas(64) int64_t scored[kLanes];
  for (int j = 0; j < kLanes; ++j)
    scored[j] = s.prior.exists && j < lanes && is_scored(params, b, m + j) ? -1 : 0;
  const int64_t first = b * params.stride_b + m * params.stride_m;
  for (int64_t k = 0; k < params.documents; ++k) {
    s.log_likelihood[k] =
        lane(s.prior.relevance, k) == -kInfinity
            ? splat(-kInfinity)
            : load_lanes(params.log_likelihood, first + k * params.stride_k, params.stride_m, lanes);
  }
  Mask result;
  memcpy(&result, scored, sizeof result);
  return result;
}

// Of the tokens that were loaded; those that are not scored pull nothing.
REALM_KERNELS_ONE_COPY Column token_columns(int64_t documents, const Scratch& s, Mask scored,
                                            Marginal* marginal) {
  Best best;
  for (int64_t k = 0; k < documents; ++k) best.see(splat(lane(s.prior.relevance, k)), s.log_likelihood[k]);
  Terms sums{splat(0.0), splat(0.0)};
  for (int64_t k = 0; k < documents; ++k) {
    const Terms terms = terms_of(splat(lane(s.prior.relevance, k)), s.prior.shift,
                                 splat(lane(s.prior.mass, k)), s.log_likelihood[k] - best.log_likelihood);
    sums.joint += terms.joint;
    sums.change += terms.change;
  }
  Column column = finish_column(s.prior, best, sums, marginal, [&](const Column& deep) {
    Vec joint = splat(0.0);
    for (int64_t k = 0; k < documents; ++k) {
      joint += deep_joint(splat(lane(s.prior.relevance, k)), deep, s.log_likelihood[k] - deep.log_likelihood);
    }
    return joint;
  });
  column.share = scored ? column.share : splat(0.0);
  return column;
}

int64_t rounded_tokens(const MarginalLossParams& params) { return (params.tokens + 7) / 8 * 8; }

void token_forward(const MarginalLossParams& params, int64_t b, Scratch& s) {
  load_prior(params, b, s.prior);
  double* const kept = kept_columns(params, b, rounded_tokens(params));
  Vec loss = splat(0.0);
  Mask count{};  // of -1 each
  for (int64_t m = 0; m < params.tokens; m += kLanes) {
    const Mask scored = load_tokens(params, b, m, lanes_from(m, params.tokens), s);
    Marginal marginal;
    const Column column = token_columns(params.documents, s, scored, &marginal);
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
  const double* const kept = kept_columns(params, b, rounded_tokens(params));
  const Vec g = splat(upstream(params, b));
  for (int64_t k = 0; k < documents; ++k) s.d_relevance[k] = splat(0.0);
  for (int64_t m = 0; m < params.tokens; m += kLanes) {
    const int lanes = lanes_from(m, params.tokens);
    const Mask scored = load_tokens(params, b, m, lanes, s);
    Marginal unused;
    const Column column = kept != nullptr ? columns_kept(kept, rounded_tokens(params), m)
                                          : token_columns(documents, s, scored, &unused);
    const Kind kind = kind_of(column);
    const Mask pull = pulls(column);
    for (int64_t k = 0; k < documents; ++k) {
      const Result result = result_of(s.prior, splat(lane(s.prior.relevance, k)),
                                      splat(lane(s.prior.mass, k)), s.log_likelihood[k], column, kind);
      s.d_relevance[k] += pull ? result.residual : splat(0.0);
      if (params.d_log_likelihood == nullptr) continue;
      store_lanes(params.d_log_likelihood, params.log_likelihood.type,
                  (b * documents + k) * params.tokens + m, lanes,
                  gradient(g, pull ? result.posterior : splat(0.0)));
    }
  }
  if (params.d_scores == nullptr) return;
  auto* const sums = reinterpret_cast<double*>(s.d_relevance);
  for (int64_t k = 0; k < documents; ++k) sums[k] = sum_of(s.d_relevance[k]);
  const int64_t vectors = vectors_of(documents);
  for (int64_t v = 0; v < vectors; ++v) s.d_relevance[v] = gradient(g, s.d_relevance[v]);
  store_vectors(params.d_scores, loss_type(params), b * documents, documents, s.d_relevance);
}

// ---- What the driver calls ----

// Vectors of documents for the prior, and vectors of columns a document.
constexpr int kPriorArrays = 2, kColumnArrays = 2;

int64_t workspace(int64_t documents, bool per_token) {
  const int64_t vectors = vectors_of(documents);
  return kLanes * (kPriorArrays * vectors + kColumnArrays * (per_token ? documents : vectors));
}

Scratch scratch_in(double* memory, int64_t documents, bool per_token) {
  const int64_t vectors = vectors_of(documents), columns = per_token ? documents : vectors;
  Vec* const prior = reinterpret_cast<Vec*>(memory);
  Vec* const first = prior + kPriorArrays * vectors;
  return {{prior, prior + vectors, 0.0, 1.0, 1.0, false}, first, first + columns};
}

void forward(const MarginalLossParams& params, int64_t begin, int64_t end, double* memory) {
  Scratch s = scratch_in(memory, params.documents, params.per_token);
  Pending pending;
  for (int64_t b = begin; b < end; ++b) {
    if (params.per_token) {
      token_forward(params, b, s);
    } else {
      sequence_forward(params, b, s, pending);
      if (pending.count == kLanes || b + 1 == end) pending.flush(params, b + 1);
    }
  }
}

void backward(const MarginalLossParams& params, int64_t begin, int64_t end, double* memory) {
  Scratch s = scratch_in(memory, params.documents, params.per_token);
  for (int64_t b = begin; b < end; ++b) {
    (params.per_token ? token_backward : sequence_backward)(params, b, s);
  }
}

const MarginalLossKernels kKernels{&workspace, &forward, &backward};

}  // namespace
}  // namespace realm_kernels
