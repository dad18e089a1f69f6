// Which instruction set serves a call on this processor.
#pragma once

#include <string>
#include <vector>

namespace realm_kernels {

// In order: each runs what those before it run.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16 };

// Those compiled in that this processor runs, slowest first: "portable", "avx2", "avx512", "avx512_vnni",
// "avx512_bf16".
std::vector<std::string> instruction_sets();

// The one named, or the fastest where the name is empty. Throws std::invalid_argument for one that does not
// run here.
Isa choose_isa(const std::string& name);

}  // namespace realm_kernels
