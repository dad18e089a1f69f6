// A chunk of rows of linear_marginal_loss on the CPU: logits, statistics, gradients, all three matrix products.
// Raw pointers and sizes; Python has validated them. Legend: R rows (pairs of document and token), H hidden
// size, V vocabulary.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/marginal_loss.h"

namespace realm_kernels {

struct LinearMarginalLossParams {
  const void* hidden;     // [R, H], rows contiguous
  const void* weight;     // [V, H], rows contiguous
  FloatType type;         // of both: float32, bfloat16 or float16
  int64_t hidden_stride;  // between rows, in elements
  int64_t weight_stride;
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

  const double* factor;  // [R], the gradient of a row is factor (p - onehot(target))
  float* d_hidden;       // [R, H], written by the backward, or null
  float* d_weight;       // [V, H], added to by the backward, or null
  float* d_bias;         // [V], added to by the backward, or null
  bool first;            // d_weight holds nothing yet: it is written

  int num_threads;
  Isa isa;
};

// Floats of memory, growing with rows. The scratch depends on shape, type, num_threads and isa alone.
int64_t linear_marginal_loss_workspace(int64_t rows, int64_t vocabulary);
int64_t linear_marginal_loss_scratch(const LinearMarginalLossParams& params);
void launch_linear_marginal_loss_fwd(const LinearMarginalLossParams& params);
void launch_linear_marginal_loss_bwd(const LinearMarginalLossParams& params);

}  // namespace realm_kernels
