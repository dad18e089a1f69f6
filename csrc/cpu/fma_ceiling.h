// What the multiply-add units of this processor do when nothing else is asked of them: the limit that a
// benchmark of a scan is a fraction of. No memory is touched and no result is kept.
#pragma once

#include <cstdint>
#include <string>

namespace realm_kernels {

// Runs `steps` steps of independent multiply-adds between registers on each of `num_threads` threads and
// returns how many operations (two a multiply-add) that was in all; the caller takes the time. `kind` is
// "float32", "bfloat16" (pairs summed in float32) or "int8" (products of bytes, summed). Returns 0, and does
// nothing, where this processor has no instruction for the kind that we know of.
int64_t fma_ceiling(const std::string& kind, int64_t steps, int num_threads);

}  // namespace realm_kernels
