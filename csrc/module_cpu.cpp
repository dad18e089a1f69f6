// realm_kernels._cpu: raw addresses and sizes in, nothing of torch. Python has validated every argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/mips_topk.h"

namespace py = pybind11;
using namespace realm_kernels;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

std::string threading() {
#ifdef _OPENMP
  return "OpenMP";
#else
  return "none (built without OpenMP: one thread)";
#endif
}

// Shards come as (address, rows, row stride); a null address is an absent argument.
int64_t mips_topk(uintptr_t queries, const std::vector<std::tuple<uintptr_t, int64_t, int64_t>>& shards,
                  const std::string& table_type, int64_t batch, int64_t dim, int64_t k, uintptr_t exclude,
                  int64_t num_exclude, uintptr_t row_mask, uintptr_t scores, uintptr_t indices, int num_threads,
                  const std::string& isa) {
  std::vector<TableShard> table;
  for (const auto& [address, num_rows, row_stride] : shards) {
    table.push_back({reinterpret_cast<const void*>(address), num_rows, row_stride});
  }
  const ScalarType type = table_type == "bfloat16"  ? ScalarType::kBFloat16
                          : table_type == "float16" ? ScalarType::kFloat16
                                                    : ScalarType::kFloat32;
  return launch_mips_topk({reinterpret_cast<const float*>(queries), table.data(), static_cast<int64_t>(table.size()),
                           type, batch, dim, k, reinterpret_cast<const int64_t*>(exclude), num_exclude,
                           reinterpret_cast<const bool*>(row_mask), reinterpret_cast<float*>(scores),
                           reinterpret_cast<int64_t*>(indices), num_threads, choose_isa(isa)});
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of realm_kernels";
  m.def("instruction_sets", &instruction_sets);
  m.def("compiler", &compiler);
  m.def("threading", &threading);
  // The GIL is released: two Python threads may search at once.
  m.def("mips_topk", &mips_topk, py::call_guard<py::gil_scoped_release>());
}
