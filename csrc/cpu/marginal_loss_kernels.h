// What the driver of marginal_loss calls, once for each instruction set.
#pragma once

#include "cpu/marginal_loss.h"

namespace realm_kernels {

struct MarginalLossKernels {
  // Doubles of scratch memory a thread needs, 64-byte aligned.
  int64_t (*workspace)(int64_t documents, bool per_token);
  // Examples [begin, end).
  void (*forward)(const MarginalLossParams& params, int64_t begin, int64_t end, double* workspace);
  void (*backward)(const MarginalLossParams& params, int64_t begin, int64_t end, double* workspace);
};

const MarginalLossKernels& marginal_loss_kernels_portable();
const MarginalLossKernels& marginal_loss_kernels_avx2();
const MarginalLossKernels& marginal_loss_kernels_avx512();

}  // namespace realm_kernels
