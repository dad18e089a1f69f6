// The marginal log-likelihood over documents and its gradient on the CPU: one pass each, float64 inside.
// Raw pointers and sizes; Python has validated them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace realm_kernels {

// Python names both by their numbers (realm_kernels/marginal_loss/cpu.py).
enum class FloatType { kFloat32, kFloat64, kBFloat16, kFloat16 };

namespace {  // a copy for each file: one that the linker chose could be of an instruction set not at hand
constexpr int64_t size_of(FloatType type) {
  return type == FloatType::kFloat64 ? 8 : type == FloatType::kFloat32 ? 4 : 2;
}
}  // namespace

enum class Reduction { kNone, kSum, kMean };

struct FloatArray {
  const void* data;
  FloatType type;
};

struct MarginalLossParams {
  FloatArray scores;                     // [B, K], contiguous
  FloatArray log_likelihood;             // [B, K, M], with the strides below
  FloatArray log_weight;                 // [B, K], contiguous, or null: zero
  const bool* token_mask;                // [B, M], contiguous, or null: every token is scored
  const bool* doc_mask;                  // [B, K], contiguous, or null: every document is there
  int64_t batch;                         // B
  int64_t documents;                     // K >= 1
  int64_t tokens;                        // M
  int64_t stride_b, stride_k, stride_m;  // of log_likelihood, in elements
  bool per_token;  // mode "token": a document is drawn for every token, not for the sequence
  bool wide;       // loss, d_loss and d_scores are double, not float

  Reduction reduction;

  void* loss;      // [B] with no reduction, else one number; written by the forward
  int64_t* count;  // [B] with no reduction, else null: scored columns, 0 or 1 an example in mode "sequence"

  const void* d_loss;      // shaped as loss
  double divisor;          // of d_loss: the count in reduction "mean", else 1
  void* d_scores;          // [B, K], written by the backward, or null
  void* d_log_likelihood;  // [B, K, M], contiguous, of the type of log_likelihood, written by the backward,
                           // or null

  // Between the passes, each may be null: what the forward leaves for the backward, documents in mode
  // "sequence" and where M is 1, else columns. double where wide, else float.
  void* kept_residual;   // [B, K], r
  void* kept_posterior;  // [B, K]
  double* kept_columns;  // [B, 4, M rounded up to a multiple of 8]

  double* example_loss;  // [B], [B]: scratch of the driver
  int64_t* example_count;

  int num_threads;
  Isa isa;
};

// Returns the scored columns of all examples.
int64_t launch_marginal_loss_fwd(MarginalLossParams params);
void launch_marginal_loss_bwd(const MarginalLossParams& params);

}  // namespace realm_kernels
