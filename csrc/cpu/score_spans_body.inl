// The body of score_spans, compiled once for each instruction set with kLanes floats to a vector. A span's
// representation x = ReLU(start + end) is made from two rows that lie in the first-level cache, as often as
// it is needed: twice in the forward (mean, then variance and product with v), once in the backward, which
// knows mean, reciprocal deviation and score of each span. 12 bytes a span are kept where x would take 4 S.
//
// Nothing here may be shared with another translation unit (no std templates): the linker might keep the copy
// for an instruction set this processor lacks.
#include <math.h>
#include <string.h>

#include "cpu/score_spans_kernels.h"

namespace realm_kernels {
namespace {

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec load(const float* source) {
  Vec result;
  memcpy(&result, source, sizeof result);
  return result;
}

inline void store(float* target, Vec value) { memcpy(target, &value, sizeof value); }

// Upper half onto lower half, until one is left.
inline float sum_of(const Vec& x) {
  float sum[kLanes];
  memcpy(sum, &x, sizeof sum);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  return sum[0];
}

// ReLU(start + end); NaN stays NaN.
inline Vec representation(const float* start, const float* end, int64_t s) {
  const Vec sum = load(start + s) + load(end + s);
  return sum < 0.0f ? Vec{} : sum;
}

// Two sums at once hide the latency of an addition.
void forward_span(const ScoreSpansParams& params, const float* start, const float* end, int64_t c) {
  const int64_t width = params.width;
  const float share = 1.0f / static_cast<float>(width);
  Vec sums[2] = {};
  for (int64_t s = 0; s < width; s += 2 * kLanes) {
    sums[0] += representation(start, end, s);
    if (s + kLanes < width) sums[1] += representation(start, end, s + kLanes);
  }
  const float mean = sum_of(sums[0] + sums[1]) * share;
  Vec squares{}, products{};
  for (int64_t s = 0; s < width; s += kLanes) {
    const Vec centred = representation(start, end, s) - mean;
    squares += centred * centred;
    products += centred * load(params.weight + s);
  }
  const float rstd = 1.0f / sqrtf(sum_of(squares) * share + params.eps);
  params.mean[c] = mean;
  params.rstd[c] = rstd;
  params.scores[c] = sum_of(products) * rstd;
}

// dx = g rstd (v - x^ <v, x^> / S) where x > 0, to both ends; dv += g x^.
template <bool kHalves, bool kWeight>
void backward_span(const ScoreSpansParams& params, const float* start, const float* end, int64_t c,
                   float* d_start, float* d_end, float* d_weight) {
  const float g = params.d_scores[c];
  if (g == 0.0f) return;
  const float mean = params.mean[c], rstd = params.rstd[c];
  const float pull = params.scores[c] / static_cast<float>(params.width), scale = g * rstd;
  for (int64_t s = 0; s < params.width; s += kLanes) {
    const Vec x = representation(start, end, s);
    const Vec normal = (x - mean) * rstd;
    if constexpr (kHalves) {
      const Vec dx = scale * (load(params.weight + s) - normal * pull);
      const Vec passed = x == 0.0f ? Vec{} : dx;
      store(d_start + s, load(d_start + s) + passed);
      store(d_end + s, load(d_end + s) + passed);
    }
    if constexpr (kWeight) store(d_weight + s, load(d_weight + s) + g * normal);
  }
}

void forward(const ScoreSpansParams& params, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const float* const starts = params.start + n * params.length * params.start_stride;
    const float* const ends = params.end + n * params.length * params.end_stride;
    int64_t c = n * params.spans;
    for (int64_t w = 0; w < params.max_width; ++w) {
      for (int64_t t = 0; t + w < params.length; ++t, ++c) {
        forward_span(params, starts + t * params.start_stride, ends + (t + w) * params.end_stride, c);
      }
    }
  }
}

template <bool kHalves, bool kWeight>
void backward_rows(const ScoreSpansParams& params, int64_t begin, int64_t end) {
  const int64_t size = params.length * params.width;
  for (int64_t n = begin; n < end; ++n) {
    float* const d_starts = kHalves ? params.d_start + n * size : nullptr;
    float* const d_ends = kHalves ? params.d_end + n * size : nullptr;
    float* const d_weight = kWeight ? params.d_weight_of + n * params.width : nullptr;
    if constexpr (kHalves) {
      memset(d_starts, 0, size * sizeof(float));
      memset(d_ends, 0, size * sizeof(float));
    }
    if constexpr (kWeight) memset(d_weight, 0, params.width * sizeof(float));
    const float* const starts = params.start + n * params.length * params.start_stride;
    const float* const ends = params.end + n * params.length * params.end_stride;
    int64_t c = n * params.spans;
    for (int64_t w = 0; w < params.max_width; ++w) {
      for (int64_t t = 0; t + w < params.length; ++t, ++c) {
        backward_span<kHalves, kWeight>(params, starts + t * params.start_stride,
                                        ends + (t + w) * params.end_stride, c,
                                        kHalves ? d_starts + t * params.width : nullptr,
                                        kHalves ? d_ends + (t + w) * params.width : nullptr, d_weight);
      }
    }
  }
}

void backward(const ScoreSpansParams& params, int64_t begin, int64_t end) {
  if (params.d_start == nullptr) {
    backward_rows<false, true>(params, begin, end);
  } else if (params.d_weight == nullptr) {
    backward_rows<true, false>(params, begin, end);
  } else {
    backward_rows<true, true>(params, begin, end);
  }
}

const ScoreSpansKernels kKernels{&forward, &backward};

}  // namespace
}  // namespace realm_kernels
