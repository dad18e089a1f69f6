// The scores of an extractive reader's spans and their gradients on the CPU: no span's representation is ever
// in memory. Raw pointers and sizes; Python has validated them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace realm_kernels {

// Spans of one wordpiece first, then of two, ..., each by its start: C = sum over w of T - w + 1.
struct ScoreSpansParams {
  const float* start;   // [N, T, S], rows start_stride apart
  const float* end;     // [N, T, S], rows end_stride apart
  const float* weight;  // [S], v: LayerNorm's weight times the dense layer's, of sum 0
  int64_t start_stride, end_stride;
  int64_t rows;       // N
  int64_t length;     // T >= 1
  int64_t width;      // S, a multiple of 16
  int64_t max_width;  // in [1, T]
  int64_t spans;      // C
  float eps;

  // Written by the forward, read by the backward.
  float* scores;  // [N, C], <v, x^>
  float* mean;    // [N, C], of x = ReLU(start + end)
  float* rstd;    // [N, C]

  const float* d_scores;  // [N, C]
  float* d_start;         // [N, T, S], contiguous, written by the backward; null where neither half is wanted
  float* d_end;           // [N, T, S], null where d_start is
  float* d_weight;        // [S], null where it is not wanted

  float* d_weight_of;  // [N, S], scratch of the driver: summed over rows in their order

  int num_threads;
  Isa isa;
};

void launch_score_spans_fwd(const ScoreSpansParams& params);
void launch_score_spans_bwd(ScoreSpansParams params);

}  // namespace realm_kernels
