// The total order as 64-bit keys, upper bounds of groups, canonical scores: what the search kernels share.
// realm_kernels/mips_topk/README.md derives the bounds, docs/design.md section 4 fixes the score.
#pragma once

#include "cuda/device.h"
#include "cuda/mips_topk_params.h"
#include "cuda/mips_topk_words.h"

namespace realm_kernels {
namespace cuda {

// The value, so mapped that integers compare as floats do, above the complement of the index: descending keys
// are value descending, then index ascending, and no two rows share one. Keys of the Triton backend are the
// same.
constexpr int64_t kNothing = INT64_MIN;  // below every key: its high half is no float's image
constexpr int32_t kLastIndex = 0x7FFFFFFF;

RK_DEVICE int64_t key_of(float value, int32_t index) {  // value: neither NaN nor -0
  const auto bits = static_cast<int32_t>(__float_as_uint(value));
  const int32_t high = bits < 0 ? bits ^ kLastIndex : bits;
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 |
                              static_cast<uint32_t>(index ^ kLastIndex));
}
RK_DEVICE int32_t high_of(int64_t key) { return static_cast<int32_t>(key >> 32); }
RK_DEVICE float value_of(int64_t key) {  // -inf for nothing
  const int32_t high = key == kNothing ? static_cast<int32_t>(0x807FFFFF) : high_of(key);
  return __uint_as_float(static_cast<uint32_t>(high < 0 ? high ^ kLastIndex : high));
}
RK_DEVICE int32_t index_of(int64_t key) { return static_cast<int32_t>(key & kLastIndex) ^ kLastIndex; }

// What a query brings to the bound of a group: U = shift + factor s M + of_norm X + of_residual E + own, M
// the largest product of the scan. Rows scanned as they are: factor = s = 1, X the largest norm, shift = E =
// 0. Codes: s the step of the group, X and E the norms of codes and residuals (README.md, "Codes").
struct QueryBound {
  double factor, shift, of_norm, of_residual, own;
};

// An error from here on says nothing: float32 sums of the scan may have overflowed.
constexpr double kOverflow = 0x1p100;

constexpr uint32_t kInfinityBits = 0x7F800000u;
RK_DEVICE float infinity() { return __uint_as_float(kInfinityBits); }

// has_row: false where the scan met no row that counts. With an error that is not finite that is not known:
// the scores of rows may themselves be -inf.
RK_DEVICE float upper_bound(const QueryBound& q, double product, bool has_row, double scale, double norm,
                            double residual) {
  const double error = q.of_norm * norm + q.of_residual * residual + q.own;
  float bound = infinity();
  if (error < kOverflow) {  // NaN compares false
    bound = has_row ? round_up_to_float(q.shift + q.factor * scale * product + error) + 0.0f : -infinity();
  }
  return q.of_norm != q.of_norm ? -infinity() : bound;  // nothing is returned for a NaN query
}

// Of rows scanned as they are a quad has one norm, the largest; of codes the least and the largest of their
// numbers.
struct alignas(16) CodeQuad {
  float least_step, step, norm, residual;
};

// No less than upper_bound() of any group of a quad, in a few float32 operations that round upward: what is
// below the floor of a selection is not looked at again. The terms of the query are made a little larger than
// they are, which is more than the roundings to nearest of upper_bound() may have lost.
struct QuadBound {
  float step_up, step_down, shift, of_norm, of_residual, own;

  RK_DEVICE static QuadBound of(const QueryBound& q) {
    constexpr double kMore = 1 + 0x1p-22, kLess = 1 - 0x1p-22;
    return {round_up_to_float(q.factor * kMore),
            round_down_to_float(q.factor * kLess),
            round_up_to_float(q.shift + fabs(q.shift) * (kMore - 1)),
            round_up_to_float(q.of_norm * kMore),
            round_up_to_float(q.of_residual * kMore),
            round_up_to_float(q.own * kMore)};
  }

  RK_DEVICE float of_rows(float product, float norm) const {
    return bounded(product, multiply_add_up(of_norm, norm, own));
  }
  RK_DEVICE float of_codes(float product, const CodeQuad& quad) const {
    const float error = multiply_add_up(of_norm, quad.norm, multiply_add_up(of_residual, quad.residual, own));
    const float step =
        product < 0.0f ? multiply_down(step_down, quad.least_step) : multiply_up(step_up, quad.step);
    return bounded(multiply_add_up(step, product, shift), error);
  }

  RK_DEVICE static float bounded(float product, float error) {
    return error < static_cast<float>(kOverflow) ? add_up(product, error) : infinity();
  }
};

RK_DEVICE float bfloat16_to_float(uint32_t bits) { return __uint_as_float(bits << 16); }

RK_DEVICE uint32_t to_bfloat16(float x) {  // to the nearest, ties to even; NaN stays NaN
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
}

RK_DEVICE float load_number(const void* data, Number type, int64_t i) {
  if (type == Number::kFloat32) {
    return static_cast<const float*>(data)[i];
  }
  const uint32_t bits = static_cast<const uint16_t*>(data)[i];
  return type == Number::kBFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

constexpr int kLanes = 8;  // of the canonical sum

// Eight neighbouring elements of a row, 16-byte aligned: one for each lane of the sum.
template <Number kType>
RK_DEVICE void load_lanes(const void* row, int64_t chunk, float (&x)[kLanes]) {
  const auto* vectors = static_cast<const Vector16*>(row);
  if constexpr (kType == Number::kFloat32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vector16 v = vectors[2 * chunk + half];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        x[4 * half + w] = __uint_as_float(v.words[w]);
      }
    }
  } else {
    const Vector16 v = vectors[chunk];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t low = v.words[w] & 0xFFFFu, high = v.words[w] >> 16;
      x[2 * w] = kType == Number::kBFloat16 ? bfloat16_to_float(low) : half_to_float(low);
      x[2 * w + 1] = kType == Number::kBFloat16 ? bfloat16_to_float(high) : half_to_float(high);
    }
  }
}

// The canonical score: lane j adds the float64 products of d = j (mod 8) in increasing d. Products of two
// float32 are exact in float64, so a fused multiply-add gives the same bits.
template <Number kType>
RK_DEVICE float canonical_score(const double* query, const void* rows, int64_t row, int64_t stride, int dim,
                                bool aligned) {
  constexpr int kBytes = kType == Number::kFloat32 ? 4 : 2;
  const void* x_row = static_cast<const unsigned char*>(rows) + row * stride * kBytes;
  double p[kLanes] = {};
  const int chunks = aligned ? dim / kLanes : 0;
  // 64 bytes of a row are under way at once.
  [[maybe_unused]] constexpr int kAtOnce = kType == Number::kFloat32 ? 2 : 4;
#pragma unroll kAtOnce
  for (int c = 0; c < chunks; ++c) {
    float x[kLanes];
    load_lanes<kType>(x_row, c, x);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      p[j] += query[c * kLanes + j] * static_cast<double>(x[j]);
    }
  }
  for (int first = chunks * kLanes; first < dim; first += kLanes) {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      if (first + j < dim) {
        p[j] += query[first + j] * static_cast<double>(load_number(x_row, kType, first + j));
      }
    }
  }
  const double total = ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
  return static_cast<float>(total) + 0.0f;  // -0 becomes +0
}

}  // namespace cuda
}  // namespace realm_kernels
