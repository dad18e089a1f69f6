// Kernels are loaded to a device when they are first used, which may wait for all that runs there and is not
// for a capture (CUDA Programming Guide, "Lazy Loading"). So all of them are loaded at once, before.
#pragma once

#include <cuda_runtime.h>

namespace realm_kernels {
namespace cuda {

// To the current device; from then on it may be launched with all the shared memory that a block may have.
template <class Kernel>
cudaError_t load_kernel(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  int device = 0, most = 0;
  cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  status = status == cudaSuccess ? cudaGetDevice(&device) : status;
  status = status == cudaSuccess
               ? cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)
               : status;
  return status == cudaSuccess ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                      most - static_cast<int>(attributes.sharedSizeBytes))
                               : status;
}

}  // namespace cuda
}  // namespace realm_kernels
