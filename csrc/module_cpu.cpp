// realm_kernels._cpu: raw addresses and sizes in, nothing of torch. Python has validated every argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of realm_kernels";
  m.def("instruction_sets", &instruction_sets);
  m.def("compiler", &compiler);
  m.def("threading", &threading);
}
