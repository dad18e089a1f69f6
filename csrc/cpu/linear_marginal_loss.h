// linear_marginal_loss on the CPU: a chunk of rows, with its logits, statistics, gradients and all three
// matrix products, and a call, chunk by chunk. Raw pointers and sizes; Python has validated them. Legend: B
// examples, K documents, M tokens, R rows of a chunk (pairs of document and token), H hidden size, V
// vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#include "cpu/marginal_loss.h"

namespace realm_kernels {

struct LinearMarginalLossParams {
  const void* hidden;     // [rows, H], rows contiguous
  const void* weight;     // [V, H], rows contiguous
  FloatType type;         // of both: float32, bfloat16 or float16
  int64_t hidden_stride;  // between rows, in elements
  int64_t weight_stride;
  const int64_t* place;    // [R], which rows of hidden, and of d_hidden, are the chunk's; null: the first R
  const float* bias;       // [V] or null
  const int64_t* targets;  // [R], in [0, V)
  int64_t rows;            // R >= 1
  int64_t width;           // H >= 1
  int64_t vocabulary;      // V >= 1

  float* workspace;  // what the forward leaves for the backward: linear_marginal_loss_workspace() floats;
                     // null in a forward without a backward
  float* scratch;    // linear_marginal_loss_scratch() floats, what they hold means nothing between calls
  double* log_p;     // [R], log softmax at the target; written by the forward
  double* log_sum;   // [R], log of the sum over V of exp(logit); written by the forward

  const double* factor;     // [R], the gradient of a row is factor (p - onehot(target))
  void* d_hidden;           // [rows, H], contiguous, or null; the chunk's are written by the backward
  FloatType d_hidden_type;  // float32 or bfloat16
  float* d_weight;          // [V, H], added to by the backward, or null
  float* d_bias;            // [V], added to by the backward, or null
  bool first;               // d_weight holds nothing yet: it is written

  int num_threads;
  Isa isa;
};

// Floats of memory, growing with rows, from shape, type, num_threads and isa alone.
int64_t linear_marginal_loss_workspace(const LinearMarginalLossParams& params);
int64_t linear_marginal_loss_scratch(const LinearMarginalLossParams& params);
void launch_linear_marginal_loss_fwd(const LinearMarginalLossParams& params);
void launch_linear_marginal_loss_bwd(const LinearMarginalLossParams& params);

struct LinearMarginalLossCall {
  LinearMarginalLossParams chunk;  // what chunks share; rows is the most of one. With a workspace, gradients
                                   // are made: those of d_hidden, d_weight and d_bias that are not null
  MarginalLossParams documents;    // scores, doc_mask, log_weight, mode and extents of all examples
  FloatArray bias;                 // [V] or null
  const int64_t* targets;          // [B, M]
  int64_t ignore_index;            // a target that is not scored
  bool whole_examples;             // a chunk holds all rows of its examples; needed unless has_factor

  double* log_likelihood;  // [B, K, M], contiguous, 0 for rows without a part; written, as are the loss and
                           // the count of `documents`, if there is no factor yet
  double* factor;          // [B, K, M], contiguous, the upstream gradient times the posterior
  bool has_factor;         // else it becomes the posterior
};
// Rows have a part if their document is there, their token scored, and their factor, where there is one, not
// 0. Of others hidden is never looked at, and d_hidden is 0.
struct LinearMarginalLossResult {
  int64_t counted;  // as of launch_marginal_loss_fwd; 0 where there was a factor
  int64_t rows_with_part;
};
LinearMarginalLossResult launch_linear_marginal_loss(const LinearMarginalLossCall& call);

struct ScaledArray {
  FloatArray values;  // [count], float32 or bfloat16, as is out
  void* out;
  FloatType out_type;
  int64_t count;
};
// Of each, out = scale values, rounded once.
void launch_scale(const std::vector<ScaledArray>& arrays, float scale, int num_threads, Isa isa);

}  // namespace realm_kernels
