// What the driver of score_spans calls, once for each instruction set: rows [begin, end).
#pragma once

#include "cpu/score_spans.h"

namespace realm_kernels {

struct ScoreSpansKernels {
  void (*forward)(const ScoreSpansParams& params, int64_t begin, int64_t end);
  void (*backward)(const ScoreSpansParams& params, int64_t begin, int64_t end);
};

const ScoreSpansKernels& score_spans_kernels_portable();
const ScoreSpansKernels& score_spans_kernels_avx2();
const ScoreSpansKernels& score_spans_kernels_avx512();

}  // namespace realm_kernels
