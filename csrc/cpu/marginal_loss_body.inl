// The body of marginal_loss, compiled once for each instruction set with kLanes doubles to a vector: how the
// columns of the two modes become lanes, what is read and what is written. Each pass reads the
// log-likelihoods once.
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

// The type of the loss, its gradient to scores, and of documents that are kept.
FloatType loss_type(const MarginalLossParams& params) {
  return params.wide ? FloatType::kFloat64 : FloatType::kFloat32;
}

int64_t vectors_of(int64_t count) { return (count + kLanes - 1) / kLanes; }

int lanes_from(int64_t first, int64_t end) {
  return static_cast<int>(end - first < kLanes ? end - first : kLanes);
}

// -g x values to the row at offset.
template <class T>
void store_scaled(const T* values, int64_t count, Vec g, void* data, FloatType type, int64_t offset) {
  if (type == FloatType::kFloat32) {
    float* const target = static_cast<float*>(data) + offset;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int lanes = lanes_from(i, count);
      store_first(target + i, lanes, gradient(g, load_first(values + i, lanes)));
    }
    return;
  }
  double scaled[kChunk];
  for (int64_t first = 0; first < count; first += kChunk) {
    const int chunk = chunk_from(first, count);
    for (int i = 0; i < chunk; i += kLanes) {
      const int lanes = lanes_from(i, chunk);
      store_first(scaled + i, lanes, gradient(g, load_first(values + first + i, lanes)));
    }
    store(data, type, offset + first, chunk, scaled, 1);
  }
}

// Scratch of a thread.
struct Scratch {
  Prior prior;
  Vec* log_likelihood;  // mode "sequence": of vectors of documents; mode "token": tokens of a document
  Vec* joint;           // mode "sequence"
  Vec* spare;           // mode "sequence": two of vectors of documents
  Vec* d_relevance;     // mode "token": r of a document, one sum a lane
};

}  // namespace
}  // namespace realm_kernels

#include "cpu/marginal_loss_sequence.inl"
#include "cpu/marginal_loss_token.inl"

namespace realm_kernels {
namespace {

// Vectors a thread needs, of documents but for the columns of mode "token": a vector a document.
constexpr int kSequenceArrays = 5, kPriorArrays = 2, kColumnArrays = 2;

int64_t workspace(int64_t documents, bool per_token) {
  const int64_t vectors = vectors_of(documents);
  return kLanes *
         (per_token ? kPriorArrays * vectors + kColumnArrays * documents : kSequenceArrays * vectors);
}

Scratch scratch_in(double* memory, int64_t documents, bool per_token) {
  const int64_t vectors = vectors_of(documents);
  Vec* const first = reinterpret_cast<Vec*>(memory);
  Scratch s{};
  s.prior.relevance = first;
  s.prior.mass = first + vectors;
  s.log_likelihood = first + 2 * vectors;
  s.d_relevance = s.log_likelihood + documents;
  if (!per_token) {  // the mass takes the place of the relevance
    s.log_likelihood = first + vectors;
    s.joint = first + 2 * vectors;
    s.spare = first + 3 * vectors;
  }
  return s;
}

void forward(const MarginalLossParams& params, int64_t begin, int64_t end, double* memory) {
  Scratch s = scratch_in(memory, params.documents, params.per_token);
  Pending pending;
  for (int64_t b = begin; b < end; ++b) {
    if (params.per_token) {
      token_forward(params, b, s);
    } else {
      params.wide ? sequence_forward<double>(params, b, s, pending)
                  : sequence_forward<float>(params, b, s, pending);
      if (pending.count == kLanes || b + 1 == end) pending.flush(params, b + 1);
    }
  }
}

void backward(const MarginalLossParams& params, int64_t begin, int64_t end, double* memory) {
  Scratch s = scratch_in(memory, params.documents, params.per_token);
  for (int64_t b = begin; b < end; ++b) {
    (params.per_token ? token_backward
     : params.wide    ? sequence_backward<double>
                      : sequence_backward<float>)(params, b, s);
  }
}

const MarginalLossKernels kKernels{&workspace, &forward, &backward};

}  // namespace
}  // namespace realm_kernels
