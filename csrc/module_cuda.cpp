// realm_kernels._cuda: raw device addresses, sizes and a stream in, nothing of torch. Python has validated
// every argument and set the device. The CUDA runtime is linked statically, so this imports without a driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/marginal_loss.h"
#include "cuda/mips_topk.h"

namespace py = pybind11;
using namespace realm_kernels::cuda;

namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // the runtime remembers it too, and the next launch must not be blamed for it
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

Number number(const std::string& dtype) {
  return dtype == "bfloat16" ? Number::kBFloat16 : dtype == "float16" ? Number::kFloat16 : Number::kFloat32;
}

Scanned scanned(const std::string& dtype) {
  return dtype == "int8" ? Scanned::kInt8 : dtype == "float16" ? Scanned::kFloat16 : Scanned::kBFloat16;
}

// B, N, D, k, E; what the scan multiplies, and whether queries are it already; rows of a group of codes, or
// 0; multiprocessors, and clusters as mips_topk_load() told; bytes of workspace at most.
using Shape = std::tuple<std::array<int64_t, 5>, std::string, bool, int, int, int, int64_t>;

SearchShape search_shape(const Shape& shape) {
  const auto& [sizes, type, is_exact, code_group, multiprocessors, large_clusters, workspace] = shape;
  return {sizes[0], sizes[1],   sizes[2],        sizes[3],       sizes[4], scanned(type),
          is_exact, code_group, multiprocessors, large_clusters, workspace};
}

int mips_topk_load() {
  int large_clusters = 0;
  check(load_mips_topk(&large_clusters));
  return large_clusters;
}

py::dict mips_topk_plan(const Shape& shape) {
  const MipsTopkPlan plan = plan_mips_topk(search_shape(shape));
  py::dict told;
  told["batch"] = plan.batch;
  told["bytes"] = plan.bytes;
  told["shape"] = plan.shape == 0 ? "wide" : plan.shape == 1 ? "deep" : "narrow";
  told["kept"] = plan.kept;
  told["selected"] = plan.selected;
  told["stages"] = plan.stages;
  told["shared_bytes"] = plan.shared_bytes;
  told["blocks"] = plan.blocks;
  told["cluster"] = plan.cluster;
  told["words"] = plan.words;
  told["pitch"] = plan.pitch;
  return told;
}

using Queries = std::tuple<uintptr_t, int, std::string, int64_t, int64_t>;  // address, count, dtype, strides
using Rows = std::tuple<uintptr_t, std::string, int64_t, int64_t>;   // address, dtype, stride, first id
using Exclude = std::tuple<uintptr_t, int64_t, int64_t>;             // address, strides
using Codes = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t>;  // codes, their pitch, mean, bounds

void mips_topk(const Shape& shape, const Queries& queries, const Rows& rows, uintptr_t row_mask,
               const Exclude& exclude, const Codes& codes, std::array<uintptr_t, 3> results,
               uintptr_t workspace, bool with_maxima, bool whole, uintptr_t stream) {
  const SearchShape sizes = search_shape(shape);
  MipsTopkParams p{};
  p.num_rows = static_cast<int>(sizes.num_rows);
  p.dim = static_cast<int>(sizes.dim);
  p.k = static_cast<int>(sizes.k);
  p.num_excluded = static_cast<int>(sizes.num_excluded);
  p.code_group = sizes.code_group;
  p.queries = pointer<const void>(std::get<0>(queries));
  p.batch = std::get<1>(queries);
  p.query_type = number(std::get<2>(queries));
  p.query_stride = std::get<3>(queries);
  p.query_stride_d = std::get<4>(queries);
  p.rows = pointer<const void>(std::get<0>(rows));
  p.row_type = number(std::get<1>(rows));
  p.row_stride = std::get<2>(rows);
  p.first_row = std::get<3>(rows);
  const int64_t row_bytes = p.row_stride * (p.row_type == Number::kFloat32 ? 4 : 2);
  p.aligned = std::get<0>(rows) % 16 == 0 && row_bytes % 16 == 0;
  p.row_mask = pointer<const bool>(row_mask);
  p.exclude = pointer<const int64_t>(std::get<0>(exclude));
  p.exclude_stride = std::get<1>(exclude);
  p.exclude_stride_e = std::get<2>(exclude);
  p.codes = pointer<const int8_t>(std::get<0>(codes));
  p.code_pitch = std::get<1>(codes);
  p.mean = pointer<const float>(std::get<2>(codes));
  p.code_bounds = pointer<const float>(std::get<3>(codes));
  p.scores = pointer<float>(results[0]);
  p.indices = pointer<int64_t>(results[1]);
  p.repairs = pointer<unsigned long long>(results[2]);
  check(launch_mips_topk({sizes, p, pointer<unsigned char>(workspace), with_maxima, whole},
                         reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of realm_kernels";
  m.def("driver_version", &driver_version);
  m.def("runtime_version", &runtime_version);
  m.def("architectures", &architectures);
  m.def("marginal_loss", &marginal_loss, py::call_guard<py::gil_scoped_release>());
  m.def("mips_topk_load", &mips_topk_load);
  m.def("mips_topk_plan", &mips_topk_plan);
  m.def("mips_topk", &mips_topk, py::call_guard<py::gil_scoped_release>());
}
