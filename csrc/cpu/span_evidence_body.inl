// The body of span_evidence, compiled once for each instruction set with kLanes doubles to a vector: the
// spans of one document fill the lanes. The forward walks them twice (largest, sum), the backward once, with
// one exponential a span each. The formulas are those of realm_kernels/span_marginal_loss/reference.py.
//
// Nothing here may be shared with another translation unit (no std templates): the linker might keep the copy
// for an instruction set this processor lacks.
#include <string.h>

#include "cpu/marginal_loss_columns.inl"
#include "cpu/marginal_loss_float.inl"
#include "cpu/marginal_loss_rows.inl"
#include "cpu/span_evidence_kernels.h"

namespace realm_kernels {
namespace {

typedef int8_t ByteVec __attribute__((vector_size(kLanes)));

// kLanes spans of a row: a span is right, wrong or neither, that is invalid or beyond the end.
struct Spans {
  Vec score;
  Mask right;
  Mask wrong;
};

inline Mask load_mask(const bool* source, int lanes) {
  ByteVec bytes{};
  if (lanes == kLanes) {
    memcpy(&bytes, source, kLanes);
  } else {
    for (int j = 0; j < lanes; ++j) bytes[j] = source[j];
  }
  return __builtin_convertvector(bytes, Mask) != 0;
}

inline int span_lanes(const SpanEvidenceParams& params, int64_t c) {
  return static_cast<int>(params.spans - c < kLanes ? params.spans - c : kLanes);
}

inline Spans load_spans(const SpanEvidenceParams& params, int64_t offset, int lanes) {
  const Mask correct = load_mask(params.correct + offset, lanes);
  Mask valid = ~Mask{};
  if (params.valid != nullptr) {
    valid = load_mask(params.valid + offset, lanes);
  } else if (lanes < kLanes) {
    valid = first_lanes(lanes);
  }
  return {load_lanes(params.span_scores, offset, 1, lanes), correct & valid, ~correct & valid};
}

// One number, by the vector code: there is no other that has the same last bit everywhere.
inline double exp_of(double x) { return exponential(splat(x)).exp[0]; }
inline double log_of_one(double x) { return log_of(splat(x))[0]; }
inline double log1p_of_one(double x) { return log1p_of(splat(x))[0]; }

// top + log(sum of exp(x - top)), where infinities and NaN are their own sum.
inline double log_sum(double top, double sum) { return top - top == 0.0 ? top + log_of_one(sum) : top; }

// log(1 + exp(x))
inline double softplus(double x) { return x > 0.0 ? x + log1p_of_one(exp_of(-x)) : log1p_of_one(exp_of(x)); }

// Returns the log-sum-exp over valid spans.
double forward_row(const SpanEvidenceParams& params, int64_t row) {
  Vec top_right = splat(-kInfinity), top_wrong = splat(-kInfinity);
  Mask found{};
  const int64_t first = row * params.spans;
  for (int64_t c = 0; c < params.spans; c += kLanes) {
    const Spans s = load_spans(params, first + c, span_lanes(params, c));
    top_right = larger(top_right, s.right ? s.score : splat(-kInfinity));
    top_wrong = larger(top_wrong, s.wrong ? s.score : splat(-kInfinity));
    found |= s.right;
  }
  const double right_top = largest_of(top_right), wrong_top = largest_of(top_wrong);
  top_right = splat(right_top - right_top == 0.0 ? right_top : 0.0);
  top_wrong = splat(wrong_top - wrong_top == 0.0 ? wrong_top : 0.0);
  Vec sum_right = splat(0.0), sum_wrong = splat(0.0);
  for (int64_t c = 0; c < params.spans; c += kLanes) {
    const Spans s = load_spans(params, first + c, span_lanes(params, c));
    const Vec e = exponential(s.score - (s.right ? top_right : top_wrong)).exp;
    sum_right += s.right ? e : splat(0.0);
    sum_wrong += s.wrong ? e : splat(0.0);
  }
  const double right = log_sum(right_top, sum_of(sum_right));
  const double wrong = log_sum(wrong_top, sum_of(sum_wrong));
  const bool none_right = right == -kInfinity, none_wrong = wrong == -kInfinity;
  const double gap = none_right | none_wrong ? 0.0 : softplus(wrong - right);
  params.right[row] = right;
  params.wrong[row] = wrong;
  params.log_likelihood[row] = none_right ? -kInfinity : -gap;
  params.has_correct[row] = any(found);
  return none_right ? wrong : right + gap;
}

double no_document(const SpanEvidenceParams& params, int64_t row) {
  params.right[row] = params.wrong[row] = params.log_likelihood[row] = -kInfinity;
  params.has_correct[row] = false;
  return -kInfinity;
}

// Documents of one span each, as in the released retriever loss: the span is its own log-sum-exp.
void forward_ones(const SpanEvidenceParams& params, int64_t row, int count, const double* relevance) {
  double score[kChunk];
  load(params.span_scores, row, 1, count, score);
  for (int i = 0; i < count; ++i) {
    const bool valid = relevance[i] != -kInfinity && (params.valid == nullptr || params.valid[row + i]);
    const bool correct = valid & params.correct[row + i];
    params.right[row + i] = correct ? score[i] : -kInfinity;
    params.wrong[row + i] = valid & !correct ? score[i] : -kInfinity;
    params.log_likelihood[row + i] = correct & (score[i] != -kInfinity) ? 0.0 : -kInfinity;
    params.relevance[row + i] = !params.is_global ? relevance[i]
                                : valid           ? relevance[i] + score[i]
                                                  : -kInfinity;
    params.has_correct[row + i] = correct;
  }
}

void forward(const SpanEvidenceParams& params, int64_t begin, int64_t end) {
  double relevance[kChunk], log_weight[kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int count = chunk_from(first, end);
    load(params.scores, first, 1, count, relevance);
    if (params.log_weight.data != nullptr) {
      load(params.log_weight, first, 1, count, log_weight);
      for (int i = 0; i < count; ++i) relevance[i] += log_weight[i];
    }
    for (int i = 0; i < count && params.doc_mask != nullptr; ++i) {
      relevance[i] = params.doc_mask[first + i] ? relevance[i] : -kInfinity;
    }
    if (params.spans == 1) {
      forward_ones(params, first, count, relevance);
      continue;
    }
    for (int i = 0; i < count; ++i) {
      const int64_t row = first + i;
      const bool is_document = relevance[i] != -kInfinity;
      const double log_normalizer = is_document ? forward_row(params, row) : no_document(params, row);
      params.relevance[row] = params.is_global && is_document ? relevance[i] + log_normalizer : relevance[i];
    }
  }
}

// d exp(score - log_sum) where it counts. Selected, not multiplied: an infinite d times zero would be NaN.
struct Share {
  double d;
  double log_sum;
};

void backward_row(const SpanEvidenceParams& params, int64_t row, double d_log_likelihood, double d_n) {
  const double right = params.right[row], wrong = params.wrong[row];
  const bool none_right = right == -kInfinity, none_wrong = wrong == -kInfinity;
  if (none_right & none_wrong) {  // no document, or none of its spans counts: nothing is looked at
    const double zero = 0.0;
    return store(params.d_span_scores, params.span_scores.type, row * params.spans, params.spans, &zero, 0);
  }
  // l = A - N is a constant where one side is empty.
  const double d_l = none_right | none_wrong ? 0.0 : d_log_likelihood;
  // exp(A - N) and exp(I - N), neither as a difference from 1.
  const double odds = wrong - right, ratio = exp_of(odds > 0.0 ? -odds : odds);
  const double larger_share = 1.0 / (1.0 + ratio), smaller_share = ratio / (1.0 + ratio);
  const double p_right = none_wrong ? 1.0 : none_right ? 0.0 : odds > 0.0 ? smaller_share : larger_share;
  const double p_wrong = none_right ? 1.0 : none_wrong ? 0.0 : odds > 0.0 ? larger_share : smaller_share;
  const Share of_right{none_right ? 0.0 : d_l * p_wrong + d_n * p_right, none_right ? 0.0 : right};
  const Share of_wrong{none_wrong ? 0.0 : (d_n - d_l) * p_wrong, none_wrong ? 0.0 : wrong};
  const int64_t first = row * params.spans;
  for (int64_t c = 0; c < params.spans; c += kLanes) {
    const int lanes = span_lanes(params, c);
    const Spans s = load_spans(params, first + c, lanes);
    const Vec d = s.right ? splat(of_right.d) : s.wrong ? splat(of_wrong.d) : splat(0.0);
    const Vec e = exponential(s.score - (s.right ? splat(of_right.log_sum) : splat(of_wrong.log_sum))).exp;
    store_lanes(params.d_span_scores, params.span_scores.type, first + c, lanes,
                ((d != 0.0) & (e != 0.0)) ? d * e : splat(0.0));
  }
}

// -g value, 0 where that is zero.
double scaled(double g, double value) { return value != 0.0 ? -g * value : 0.0; }

void backward(const SpanEvidenceParams& params, int64_t begin, int64_t end) {
  const FloatType loss_type = params.wide ? FloatType::kFloat64 : FloatType::kFloat32;
  double d_relevance[kChunk], d_score[kChunk];
  for (int64_t b = begin / params.documents; b * params.documents < end; ++b) {
    double g;
    load({params.d_loss, loss_type}, params.reduction == Reduction::kNone ? b : 0, 1, 1, &g);
    g /= params.divisor;
    const int64_t example_end = (b + 1) * params.documents < end ? (b + 1) * params.documents : end;
    int64_t first = b * params.documents > begin ? b * params.documents : begin;
    for (; first < example_end; first += kChunk) {
      const int count = chunk_from(first, example_end);
      for (int i = 0; i < count; ++i) d_relevance[i] = scaled(g, params.residual[first + i]);
      if (params.d_scores != nullptr) store(params.d_scores, loss_type, first, count, d_relevance, 1);
      if (params.d_span_scores == nullptr) continue;
      if (params.spans == 1) {
        // The one span's share of its document is 1, of its likelihood nothing.
        for (int i = 0; i < count; ++i) {
          const bool there = params.right[first + i] != -kInfinity || params.wrong[first + i] != -kInfinity;
          d_score[i] = there & params.is_global ? d_relevance[i] : 0.0;
        }
        store(params.d_span_scores, params.span_scores.type, first, count, d_score, 1);
        continue;
      }
      for (int i = 0; i < count; ++i) {
        backward_row(params, first + i, scaled(g, params.posterior[first + i]),
                     params.is_global ? d_relevance[i] : 0.0);
      }
    }
  }
}

const SpanEvidenceKernels kKernels{&forward, &backward};

}  // namespace
}  // namespace realm_kernels
