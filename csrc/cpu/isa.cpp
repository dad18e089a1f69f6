#include "cpu/isa.h"

#include <algorithm>
#include <stdexcept>

namespace realm_kernels {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names{"portable"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    names.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      names.push_back("avx512");
      if (__builtin_cpu_supports("avx512vnni")) {
        names.push_back("avx512_vnni");
        if (__builtin_cpu_supports("avx512bf16")) {
          names.push_back("avx512_bf16");
        }
      }
    }
  }
#endif
  return names;
}

Isa choose_isa(const std::string& name) {
  static const std::vector<std::string> names = instruction_sets();
  const std::string& chosen = name.empty() ? names.back() : name;
  if (std::find(names.begin(), names.end(), chosen) == names.end()) {
    throw std::invalid_argument("instruction set " + chosen + " does not run on this processor");
  }
  return chosen == "avx512_bf16"   ? Isa::kAvx512Bf16
         : chosen == "avx512_vnni" ? Isa::kAvx512Vnni
         : chosen == "avx512"      ? Isa::kAvx512
         : chosen == "avx2"        ? Isa::kAvx2
                                   : Isa::kPortable;
}

}  // namespace realm_kernels
