// The launch of the Hopper scan of mips_topk.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/mips_topk_plan.h"

namespace realm_kernels {
namespace cuda {
namespace sm90 {

// with_maxima false: the epilogue is empty, and no words are written.
cudaError_t launch_scan(const SearchPlan& plan, const SearchArguments& arguments, bool with_maxima,
                        cudaStream_t stream);

// Before the first launch on a device: loads every kernel, and asks how many clusters of kLargeCluster run at
// once.
cudaError_t load_scan(int* large_clusters);

}  // namespace sm90
}  // namespace cuda
}  // namespace realm_kernels
