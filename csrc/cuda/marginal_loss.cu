// One block takes one example; its threads stride over the K documents, and the M columns of mode "token"
// follow one another. Everything is float64 in registers: B * K * M numbers are read two or three times, the
// second time from cache, and a few dozen float64 operations each are far below what reading them costs. Sums
// over documents are trees of a fixed shape in shared memory (1.5 KiB), so equal inputs give equal bits. The
// maths is that of realm_kernels/marginal_loss/reference.py, name by name.
#include "cuda/marginal_loss.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace realm_kernels {
namespace cuda {
namespace {

// Four warps: REALM has 8 candidates, and readers with thousands of documents still fill them.
// Launch bounds of one block a multiprocessor leave ptxas the registers (at most 106) it would spill
// otherwise.
constexpr int kThreads = 128;

__device__ inline double minus_infinity() { return -__longlong_as_double(0x7ff0000000000000LL); }

__device__ inline double to_double(float x) { return x; }
__device__ inline double to_double(double x) { return x; }
__device__ inline double to_double(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline double to_double(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_double(double x) {
  return static_cast<T>(x);
}
template <>
__device__ inline __nv_bfloat16 from_double(double x) {
  return __double2bfloat16(x);
}
template <>
__device__ inline __half from_double(double x) {
  return __double2half(x);
}

// p (exp(d) - 1), without cancellation where d is small and without 0 x inf where p underflows.
__device__ inline double prior_times_expm1(double log_p, double d) {
  return fabs(d) < 1.0 ? exp(log_p) * expm1(d) : exp(log_p + d) - exp(log_p);
}

struct Best {
  double joint, log_prior, log_likelihood;
  int64_t document;
};

// NaN wins, and so reaches the result; among equals the smaller document.
__device__ inline bool beats(const Best& a, const Best& b) {
  if (a.joint != a.joint || b.joint != b.joint) {
    return a.joint != a.joint && !(b.joint != b.joint && b.document < a.document);
  }
  return a.joint > b.joint || (a.joint == b.joint && a.document < b.document);
}

// A column of one example: the log-likelihood of its documents, and where they are centred.
template <class T>
class Column {
 public:
  __device__ Column(const MarginalLossParams& params, int64_t b, int64_t m) : params_(params), b_(b), m_(m) {}

  __device__ double log_prior(int64_t k) const { return params_.log_prior[b_ * params_.documents + k]; }

  __device__ double log_likelihood(int64_t k) const {
    if (log_prior(k) == minus_infinity()) {  // what a masked document holds is never looked at
      return minus_infinity();
    }
    return params_.per_token ? token(k, m_) : params_.evidence[b_ * params_.documents + k];
  }

  // Mode "sequence": the sums over scored tokens. A thread reads back its own documents only.
  __device__ void sum_tokens() const {
    for (int64_t k = threadIdx.x; k < params_.documents; k += kThreads) {
      double sum = 0.0;
      for (int64_t m = 0; m < params_.tokens; ++m) {
        sum +=
            params_.token_mask == nullptr || params_.token_mask[b_ * params_.tokens + m] ? token(k, m) : 0.0;
      }
      params_.evidence[b_ * params_.documents + k] = sum;
    }
  }

  // Finds k*, the document of the largest posterior, and L', the marginal relative to it. All threads take
  // part.
  __device__ void centre() {
    Best best{minus_infinity(), 0.0, 0.0, params_.documents};
    for (int64_t k = threadIdx.x; k < params_.documents; k += kThreads) {
      const Best candidate{log_prior(k) + log_likelihood(k), log_prior(k), log_likelihood(k), k};
      best = beats(candidate, best) ? candidate : best;
    }
    best = block_best(best);
    impossible = best.joint == minus_infinity();
    centre_ = impossible ? 0.0 : best.log_likelihood;
    double change = 0.0, far = 0.0;
    for (int64_t k = threadIdx.x; k < params_.documents && !impossible; k += kThreads) {
      const double d = log_likelihood(k) - centre_;
      change += prior_times_expm1(log_prior(k), d);
      far += exp(log_prior(k) + d - best.log_prior);
    }
    change = block_sum(change);
    far = block_sum(far);
    relative_ = change > -0.5 || change != change ? log1p(change) : best.log_prior + log(far);
  }

  __device__ double log_marginal() const { return impossible ? minus_infinity() : centre_ + relative_; }

  __device__ double shift(int64_t k) const { return log_likelihood(k) - centre_ - relative_; }

  bool impossible;

 private:
  __device__ double token(int64_t k, int64_t m) const {
    const T* values = static_cast<const T*>(params_.log_likelihood);
    return to_double(values[b_ * params_.stride_b + k * params_.stride_k + m * params_.stride_m]);
  }

  __device__ static Best block_best(Best mine) {
    __shared__ Best all[kThreads];
    all[threadIdx.x] = mine;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half && beats(all[threadIdx.x + half], all[threadIdx.x])) {
        all[threadIdx.x] = all[threadIdx.x + half];
      }
    }
    __syncthreads();
    const Best best = all[0];
    __syncthreads();  // before the next call writes
    return best;
  }

  __device__ static double block_sum(double mine) {
    __shared__ double all[kThreads];
    all[threadIdx.x] = mine;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) {
        all[threadIdx.x] += all[threadIdx.x + half];
      }
    }
    __syncthreads();
    const double sum = all[0];
    __syncthreads();  // before the next call writes
    return sum;
  }

  const MarginalLossParams& params_;
  int64_t b_, m_;
  double centre_, relative_;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) marginal_loss_fwd_kernel(const MarginalLossParams params) {
  const int64_t b = blockIdx.x;
  const int64_t columns = params.per_token ? params.tokens : 1;
  double loss = 0.0;
  for (int64_t m = 0; m < columns; ++m) {
    if (params.scored[b * columns + m]) {
      Column<T> column(params, b, m);
      if (!params.per_token) {
        column.sum_tokens();
      }
      column.centre();
      loss -= column.log_marginal();
    }
  }
  if (threadIdx.x == 0) {
    params.loss[b] = loss;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) marginal_loss_bwd_kernel(const MarginalLossParams params) {
  const int64_t b = blockIdx.x;
  const int64_t columns = params.per_token ? params.tokens : 1;
  const double g = params.d_loss[b];
  T* d_log_likelihood = static_cast<T*>(params.d_log_likelihood);
  if (params.d_scores != nullptr) {  // each thread adds to its own documents only
    for (int64_t k = threadIdx.x; k < params.documents; k += kThreads) {
      params.d_scores[b * params.documents + k] = 0.0;
    }
  }
  for (int64_t m = 0; m < columns; ++m) {
    const bool scored = params.scored[b * columns + m];
    Column<T> column(params, b, m);
    if (scored) {
      if (!params.per_token) {
        column.sum_tokens();
      }
      column.centre();
    }
    for (int64_t k = threadIdx.x; k < params.documents; k += kThreads) {
      const int64_t row = b * params.documents + k;
      const bool counts = scored && !column.impossible && column.log_prior(k) != minus_infinity();
      const double posterior = counts ? exp(column.log_prior(k) + column.shift(k)) : 0.0;
      const double change = counts ? prior_times_expm1(column.log_prior(k), column.shift(k)) : 0.0;
      if (params.d_scores != nullptr && change != 0.0) {  // an infinite g times zero would be NaN
        params.d_scores[row] -= g * change;
      }
      if (d_log_likelihood != nullptr) {
        const T value = from_double<T>(posterior != 0.0 ? -g * posterior : 0.0);
        const int64_t first = params.per_token ? m : 0, end = params.per_token ? m + 1 : params.tokens;
        for (int64_t t = first; t < end; ++t) {
          const bool kept = params.token_mask == nullptr || params.token_mask[b * params.tokens + t];
          d_log_likelihood[row * params.tokens + t] = kept ? value : from_double<T>(0.0);
        }
      }
    }
  }
}

// The one switch over the dtype: four instantiations of each kernel, one a float type that torch tensors
// have.
template <class Launch>
cudaError_t with_type(FloatType type, const Launch& launch) {
  switch (type) {
    case FloatType::kFloat64:
      launch(double{});
      break;
    case FloatType::kBFloat16:
      launch(__nv_bfloat16{});
      break;
    case FloatType::kFloat16:
      launch(__half{});
      break;
    default:
      launch(float{});
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_marginal_loss_fwd(const MarginalLossParams& params, cudaStream_t stream) {
  return with_type(params.type, [&](auto zero) {
    marginal_loss_fwd_kernel<decltype(zero)>
        <<<static_cast<unsigned>(params.batch), kThreads, 0, stream>>>(params);
  });
}

cudaError_t launch_marginal_loss_bwd(const MarginalLossParams& params, cudaStream_t stream) {
  return with_type(params.type, [&](auto zero) {
    marginal_loss_bwd_kernel<decltype(zero)>
        <<<static_cast<unsigned>(params.batch), kThreads, 0, stream>>>(params);
  });
}

}  // namespace cuda
}  // namespace realm_kernels
