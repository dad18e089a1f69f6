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

// Two vectors that stand for 32 rows or columns.
struct TwoVecs {
  Vec low, high;
};

inline TwoVecs load_two(const float* from) { return {load<Vec>(from), load<Vec>(from + kWidth)}; }
inline void store_two(float* to, const TwoVecs& v) {
  store(to, v.low);
  store(to + kWidth, v.high);
}

struct Singles {
  static constexpr int64_t kEach = 1;
  static Vec add(Vec sum, Vec panel, float unit) { return sum + panel * unit; }

  // How the exponentials of a panel, in [0, 1], wait for the backward.
  static constexpr int64_t kKept = kLanes;
  static void keep(float* to, const TwoVecs& v) { store_two(to, v); }
  static TwoVecs kept(const float* from) { return load_two(from); }
};

#if defined(__AVX512BF16__)
constexpr bool kBFloat16Pairs = true;
struct Pairs {
  static constexpr int64_t kEach = 2;
  static Vec add(Vec sum, Vec panel, float unit) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)panel, (__m512bh)_mm512_set1_ps(unit));
  }

  // In 16 bits, as a chunk's exponentials go out to the last-level cache and come back. Sign and the first
  // bit of the exponent are 0 below 2, so all of the range and 10 digits of the significand remain, where
  // gradients of logits will be rounded to 8. Of a NaN it is enough that the sums have it.
  static constexpr int64_t kKept = kWidth;
  static constexpr int kDropped = 14;
  static void keep(float* to, const TwoVecs& v) {
    constexpr uint32_t kHalf = 1u << (kDropped - 1);
    const UIntVec low = ((UIntVec)v.low + kHalf) >> kDropped;
    const UIntVec high = ((UIntVec)v.high + kHalf) << (16 - kDropped);
    store(to, (low & 0xffffu) | (high & 0xffff0000u));
  }
  static TwoVecs kept(const float* from) {
    constexpr uint32_t kBits = 0xffffu << kDropped;
    const UIntVec both = load<UIntVec>(from);
    return {(Vec)(both << kDropped & kBits), (Vec)(both >> (16 - kDropped) & kBits)};
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

// e^r for |r| <= log(2) / 2, within 2^-23.3: of degree 5, 1 at 0, the largest relative error made smallest.
inline Vec exponential_near_zero(Vec r) {
  Vec p = r * 0x1.0fa7d8p-7f + 0x1.573adp-5f;
  p = p * r + 0x1.555a6ep-3f;
  p = p * r + 0x1.fffdc4p-2f;
  p = p * r + 0x1.fffff6p-1f;
  return p * r + 1.0f;
}

// exp(x) for x <= 88 within 2 ulp (3 below -40); 0 where the result would not be a normal number, NaN for
// NaN. 2^n e^r with |r| <= log(2) / 2.
inline Vec exponential(Vec x) {
  constexpr float kLog2E = 0x1.715476p0f;
#if defined(__AVX512F__)
  // The multiply-add does not round n log(2), so one part of the constant does.
  const __m512 n = _mm512_roundscale_ps((__m512)(x * kLog2E), 0);
  const Vec p = exponential_near_zero(x - (Vec)n * 0x1.62e43p-1f);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, n);
#else
  // log(2) in two parts (Cody and Waite 1980); whole numbers stand in the last bits of `shifted`.
  constexpr float kRound = 0x1.8p23f;
  const Vec shifted = x * kLog2E + kRound;
  const Vec n = shifted - kRound;
  const Vec p = exponential_near_zero((x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f);
  const Vec power = (Vec)(((UIntVec)shifted << 23) + (127u << 23));
  return x < -87.0f ? Vec{} : p * power;
#endif
}

}  // namespace
}  // namespace realm_kernels
