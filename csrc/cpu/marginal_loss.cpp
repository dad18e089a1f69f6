// The driver of marginal_loss: which instruction set, which thread takes which examples.
#include "cpu/marginal_loss.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/marginal_loss_kernels.h"
#include "cpu/parallel.h"

namespace realm_kernels {
namespace {

// Log-likelihoods a thread should have at least: below that, waking it costs what it saves.
constexpr int64_t kGrain = 1 << 13;
constexpr std::size_t kAlignment = 64;

const MarginalLossKernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) {
    return marginal_loss_kernels_avx512();
  }
  if (isa == Isa::kAvx2) {
    return marginal_loss_kernels_avx2();
  }
#endif
  (void)isa;
  return marginal_loss_kernels_portable();
}

struct Free {
  void operator()(double* pointer) const { std::free(pointer); }
};

std::unique_ptr<double, Free> allocate(int64_t doubles) {
  const std::size_t bytes =
      (static_cast<std::size_t>(doubles) * sizeof(double) / kAlignment + 1) * kAlignment;
  auto* pointer = static_cast<double*>(std::aligned_alloc(kAlignment, bytes));
  if (pointer == nullptr) {
    throw std::bad_alloc();
  }
  return std::unique_ptr<double, Free>(pointer);
}

// An example is never split, so the bits of a result do not depend on the number of threads.
void launch(MarginalLossParams params, bool backward) {
  const MarginalLossKernels& kernels = kernels_for(params.isa);
  // With one token the modes agree, and documents fill the lanes better.
  params.per_token = params.per_token && params.tokens > 1;
  const int64_t work = params.batch * params.documents * std::max<int64_t>(1, params.tokens);
  const int num_threads =
      static_cast<int>(std::min<int64_t>({params.num_threads, params.batch, 1 + work / kGrain}));
  const int64_t per_thread = (kernels.workspace(params.documents, params.per_token) / 8 + 1) * 8;
  const auto workspace = allocate(per_thread * std::max(1, num_threads));
  parallel_for(params.batch, num_threads, [&](int64_t begin, int64_t end, int thread) {
    (backward ? kernels.backward : kernels.forward)(params, begin, end,
                                                    workspace.get() + per_thread * thread);
  });
}

void write_loss(const MarginalLossParams& params, int64_t i, double value) {
  if (params.wide) {
    static_cast<double*>(params.loss)[i] = value;
  } else {
    static_cast<float*>(params.loss)[i] = static_cast<float>(value);
  }
}

}  // namespace

int64_t launch_marginal_loss_fwd(MarginalLossParams params) {
  std::vector<double> loss(static_cast<std::size_t>(params.batch));
  std::vector<int64_t> count(loss.size());
  params.example_loss = loss.data();
  params.example_count = count.data();
  launch(params, false);
  const int64_t counted = std::accumulate(count.begin(), count.end(), int64_t{0});
  if (params.reduction == Reduction::kNone) {
    for (int64_t b = 0; b < params.batch; ++b) {
      write_loss(params, b, loss[b]);
    }
    std::copy(count.begin(), count.end(), params.count);
    return counted;
  }
  const double total = std::accumulate(loss.begin(), loss.end(), 0.0);
  const bool mean = params.reduction == Reduction::kMean;
  write_loss(params, 0, mean ? total / static_cast<double>(std::max<int64_t>(1, counted)) : total);
  return counted;
}

void launch_marginal_loss_bwd(const MarginalLossParams& params) {
  if (params.d_log_likelihood != nullptr) {
    const int64_t count = params.batch * params.documents * params.tokens;
    advise_huge_pages(reinterpret_cast<uintptr_t>(params.d_log_likelihood),
                      count * size_of(params.log_likelihood.type));
  }
  launch(params, true);
}

}  // namespace realm_kernels
