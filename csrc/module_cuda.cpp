// realm_kernels._cuda: raw device addresses, sizes and a stream in, nothing of torch. Python has validated
// every argument and set the device. The CUDA runtime is linked statically, so this imports without a driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "cuda/marginal_loss.h"

namespace py = pybind11;
using namespace realm_kernels::cuda;

namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
  }
}

int driver_version() {
  int version = 0;  // and 0 it stays where there is no driver
  check(cudaDriverGetVersion(&version));
  return version;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version));
  return version;
}

std::string architectures() { return REALM_KERNELS_ARCHITECTURES; }

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

FloatType float_type(const std::string& name) {
  return name == "float64"    ? FloatType::kFloat64
         : name == "bfloat16" ? FloatType::kBFloat16
         : name == "float16"  ? FloatType::kFloat16
                              : FloatType::kFloat32;
}

// A null address is an absent argument; without d_loss this is the forward.
void marginal_loss(uintptr_t log_prior, uintptr_t log_likelihood, const std::string& type,
                   std::array<int64_t, 3> shape, std::array<int64_t, 3> stride, uintptr_t token_mask,
                   uintptr_t scored, bool per_token, uintptr_t evidence, uintptr_t loss, uintptr_t d_loss,
                   uintptr_t d_scores, uintptr_t d_log_likelihood, uintptr_t stream) {
  const MarginalLossParams params{pointer<const double>(log_prior),
                                  pointer<const void>(log_likelihood),
                                  float_type(type),
                                  stride[0],
                                  stride[1],
                                  stride[2],
                                  pointer<const bool>(token_mask),
                                  pointer<const bool>(scored),
                                  shape[0],
                                  shape[1],
                                  shape[2],
                                  per_token,
                                  pointer<double>(evidence),
                                  pointer<double>(loss),
                                  pointer<const double>(d_loss),
                                  pointer<double>(d_scores),
                                  pointer<void>(d_log_likelihood)};
  const auto launch = d_loss == 0 ? &launch_marginal_loss_fwd : &launch_marginal_loss_bwd;
  check(launch(params, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of realm_kernels";
  m.def("driver_version", &driver_version);
  m.def("runtime_version", &runtime_version);
  m.def("architectures", &architectures);
  m.def("marginal_loss", &marginal_loss, py::call_guard<py::gil_scoped_release>());
}
