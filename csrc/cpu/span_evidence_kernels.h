// What the driver of span_evidence calls, once for each instruction set: rows [begin, end).
#pragma once

#include "cpu/span_evidence.h"

namespace realm_kernels {

struct SpanEvidenceKernels {
  void (*forward)(const SpanEvidenceParams& params, int64_t begin, int64_t end);
  void (*backward)(const SpanEvidenceParams& params, int64_t begin, int64_t end);
};

const SpanEvidenceKernels& span_evidence_kernels_portable();
const SpanEvidenceKernels& span_evidence_kernels_avx2();
const SpanEvidenceKernels& span_evidence_kernels_avx512();

}  // namespace realm_kernels
