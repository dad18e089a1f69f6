// The register tile of the matrix products, and the exponential. Part of linear_marginal_loss_body.inl.
//
// A tile is kGroup rows of one operand by a panel of kLanes columns of the other. The panel is packed [depth]
// [kLanes]; the rows are broadcast from where they lie, one unit each a step. A unit is a float32, or, where
// the processor multiplies bfloat16, two of them that follow each other along the sum: two multiply-adds an
// instruction, added in float32. Either takes four bytes, so all that only moves units is written once.
#pragma once

#include <cstdint>

#include "cpu/linear_marginal_loss_kernels.h"
#include "cpu/row_elements.inl"

namespace realm_kernels {
namespace {

constexpr int64_t kLanes = 2 * kWidth;
typedef uint32_t UIntVec __attribute__((vector_size(4 * kWidth)));

struct Singles {
  static constexpr int64_t kEach = 1;
  static Vec add(Vec sum, Vec panel, float unit) { return sum + panel * unit; }
};

#if defined(__AVX512BF16__)
constexpr bool kBFloat16Pairs = true;
struct Pairs {
  static constexpr int64_t kEach = 2;
  static Vec add(Vec sum, Vec panel, float unit) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)panel, (__m512bh)_mm512_set1_ps(unit));
  }
};
#else
constexpr bool kBFloat16Pairs = false;
#endif

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory to fetch while a tile is computed, two cache lines a step: a burst of requests would stall the loads
// behind it.
struct Ask {
  const char* at;
  int64_t steps, stride;
};
constexpr Ask kAskNothing = {nullptr, 0, 0};
constexpr int64_t kLineBytes = 64;

enum class Broadcast { kRows, kColumns };

// kRows: unit k of row q is units[q * stride + k]; kColumns: units[k * stride + q]. finish(q, low, high) gets
// the sums of row q.
template <class Step, Broadcast kHow, int kRows, class Finish>
inline void tile(const float* panel, int64_t depth, const float* units, int64_t stride, const Ask& ask,
                 Finish&& finish) {
  Vec low[kRows] = {}, high[kRows] = {};
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    const Vec panel_low = load<Vec>(panel + k * kLanes), panel_high = load<Vec>(panel + k * kLanes + kWidth);
#pragma GCC unroll 16
    for (int q = 0; q < kRows; ++q) {
      const float unit = load<float>(units + (kHow == Broadcast::kRows ? q * stride + k : k * stride + q));
      low[q] = Step::add(low[q], panel_low, unit);
      high[q] = Step::add(high[q], panel_high, unit);
    }
  };
  int64_t k = 0;
  for (; k < ask.steps && k < depth; ++k) {
    __builtin_prefetch(ask.at + k * ask.stride);
    __builtin_prefetch(ask.at + k * ask.stride + kLineBytes);
    step(k);
  }
  for (; k < depth; ++k) {
    step(k);
  }
#pragma GCC unroll 16
  for (int q = 0; q < kRows; ++q) {
    finish(q, low[q], high[q]);
  }
}

// Counts down to the instantiation for `size` rows, at most kGroup.
template <class Step, Broadcast kHow, int kRows = kGroup, class Finish>
inline void tile_of(int64_t size, const float* panel, int64_t depth, const float* units, int64_t stride,
                    const Ask& ask, Finish&& finish) {
  if constexpr (kRows > 0) {
    if (size == kRows) {
      tile<Step, kHow, kRows>(panel, depth, units, stride, ask, finish);
    } else {
      tile_of<Step, kHow, kRows - 1>(size, panel, depth, units, stride, ask, finish);
    }
  }
}

// n rows as groups of at most kGroup whose sizes differ by one at most: a last group of few rows would leave
// the multiply-add units idle.
struct Groups {
  int64_t n, count;
  explicit Groups(int64_t rows) : n(rows), count((rows + kGroup - 1) / kGroup) {}
  int64_t first(int64_t g) const { return n * g / count; }
  int64_t size(int64_t g) const { return first(g + 1) - first(g); }
};

// exp(x) for x <= 88 within 2 ulp; 0 where the result would not be a normal number, NaN for NaN. 2^n e^r
// with |r| <= log(2) / 2 (ln 2 in two parts, Cody and Waite 1980), e^r by its Taylor series to r^7, whose
// rest is below 2^-27.
inline Vec exponential(Vec x) {
  constexpr float kRound = 0x1.8p23f;
  const Vec shifted = x * 0x1.715476p0f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Vec p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // Whole numbers stand in the last bits of `shifted`.
  const Vec power = (Vec)(((UIntVec)shifted << 23) + (127u << 23));
  return x < -87.0f ? Vec{} : p * power;
}

}  // namespace
}  // namespace realm_kernels
