// span_marginal_loss on the CPU: what the answer spans say of each document, then the marginal over documents
// (marginal_loss.h); float64 inside. Raw pointers and sizes; Python has validated them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/marginal_loss.h"

namespace realm_kernels {

struct SpanEvidenceParams {
  FloatArray scores;       // [R], contiguous: R = B K documents
  FloatArray log_weight;   // [R], contiguous, or null: zero
  const bool* doc_mask;    // [R], or null: every document is there
  FloatArray span_scores;  // [R, C], contiguous
  const bool* correct;     // [R, C]
  const bool* valid;       // [R, C], or null: every span exists
  int64_t documents;       // K
  int64_t rows;            // R
  int64_t spans;           // C >= 1
  bool is_global;          // normalization "global": one softmax over the spans of all documents
  bool wide;               // loss, d_loss and d_scores are double, not float
  Reduction reduction;

  // Log-sum-exp over correct and over incorrect valid spans, -inf where there is none, in a document that
  // does not exist too; posterior and r of each document. Written by the forward, read by the backward.
  double* right;      // [R]
  double* wrong;      // [R]
  double* posterior;  // [R]
  double* residual;   // [R]

  void* loss;      // [B] with no reduction, else one number; written by the forward
  int64_t* count;  // [B] with no reduction, else null: 1 where an example has a correct span

  const void* d_loss;   // shaped as loss
  double divisor;       // of d_loss: the count in reduction "mean", else 1
  void* d_scores;       // [R], written by the backward, or null
  void* d_span_scores;  // [R, C], contiguous, of the type of span_scores, written by the backward, or null

  // Scratch of the driver, written for each document.
  double* log_likelihood;  // [R], log p(correct | document)
  double* relevance;       // [R], s + log w, and with "global" the log-sum-exp over valid spans
  bool* has_correct;       // [R], whether there is a correct valid span

  int num_threads;
  Isa isa;
};

// Returns how many examples count.
int64_t launch_span_marginal_loss_fwd(SpanEvidenceParams params);
void launch_span_marginal_loss_bwd(const SpanEvidenceParams& params);

}  // namespace realm_kernels
