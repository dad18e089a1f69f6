// The marginal log-likelihood over documents and its gradient on the GPU. Raw device pointers, sizes and a
// stream; launchers return what CUDA said and wait for nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace realm_kernels {
namespace cuda {

enum class FloatType { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct MarginalLossParams {
  const double* log_prior;               // [B, K], -inf where masked
  const void* log_likelihood;            // [B, K, M], with the strides below
  FloatType type;                        // of log_likelihood and d_log_likelihood
  int64_t stride_b, stride_k, stride_m;  // of log_likelihood, in elements
  const bool* token_mask;                // [B, M], or null: every token is scored
  const bool* scored;                    // [B, M] in mode "token", else [B, 1]: columns that count
  int64_t batch, documents, tokens;      // B, K, M
  bool per_token;                        // mode "token"
  double* evidence;                      // [B, K], scratch of mode "sequence"
  double* loss;                          // [B], written by the forward
  const double* d_loss;                  // [B]
  double* d_scores;                      // [B, K], written by the backward, or null
  void* d_log_likelihood;                // [B, K, M], contiguous, written by the backward, or null
};

cudaError_t launch_marginal_loss_fwd(const MarginalLossParams& params, cudaStream_t stream);
cudaError_t launch_marginal_loss_bwd(const MarginalLossParams& params, cudaStream_t stream);

}  // namespace cuda
}  // namespace realm_kernels
