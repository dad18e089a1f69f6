// What the answer spans say of each document, and its gradient, on the CPU: each span read once into the
// first-level cache, float64 inside. Raw pointers and sizes; Python has validated them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/marginal_loss.h"

namespace realm_kernels {

struct SpanEvidenceParams {
  FloatArray span_scores;   // [R, C], contiguous: R = B K documents
  const bool* correct;      // [R, C]
  const bool* valid;        // [R, C], or null: every span exists
  const bool* is_document;  // [R]
  int64_t rows;             // R
  int64_t spans;            // C >= 1

  // Log-sum-exp over correct and over incorrect valid spans, -inf where there is none: written by the
  // forward, read by the backward.
  double* right;  // [R]
  double* wrong;  // [R]

  double* log_likelihood;  // [R], log p(correct | document), written by the forward
  double* log_normalizer;  // [R], log-sum-exp over valid spans, written by the forward
  bool* has_correct;       // [R], whether there is a correct valid span, written by the forward

  const double* d_log_likelihood;  // [R]
  const double* d_log_normalizer;  // [R]
  void* d_span_scores;             // [R, C], contiguous, of the type of span_scores, written by the backward

  int num_threads;
  Isa isa;
};

void launch_span_evidence_fwd(const SpanEvidenceParams& params);
void launch_span_evidence_bwd(const SpanEvidenceParams& params);

}  // namespace realm_kernels
