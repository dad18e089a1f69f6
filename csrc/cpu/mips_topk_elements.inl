// What the rows of a table are made of for the scans, and the canonical score. Part of mips_topk_body.inl.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/mips_topk_kernels.h"
#include "cpu/row_elements.inl"

namespace realm_kernels {
namespace {

constexpr int64_t kLineBytes = 64;  // of a cache line

typedef float Float4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));

// Sixteen elements in the order of the packed queries: for bfloat16 the even ones come first, which saves the
// widening of each half.
struct Pair {
  Vec8 first, second;
};

template <class T>
inline Pair load16(const T* row) {
  return {load8(row), load8(row + 8)};
}

inline Pair load16(const BFloat16* row) {
  const UInt8 both = load<UInt8>(row);
  return {(Vec8)(both << 16), (Vec8)(both & 0xffff0000u)};
}

// The sums of eight accumulators, one in each lane.
inline Vec8 horizontal_sums(const Vec8 (&v)[8]) {
  const Vec8 a = low_ones(v[0], v[1]) + high_ones(v[0], v[1]),
             b = low_ones(v[2], v[3]) + high_ones(v[2], v[3]);
  const Vec8 c = low_ones(v[4], v[5]) + high_ones(v[4], v[5]),
             d = low_ones(v[6], v[7]) + high_ones(v[6], v[7]);
  const Vec8 e = low_pairs(a, b) + high_pairs(a, b), f = low_pairs(c, d) + high_pairs(c, d);
  return low_halves(e, f) + high_halves(e, f);
}

// Keeps GCC from loading a value anew for each multiply-add: there are two of them to a load, and no more.
inline Vec8 in_register(Vec8 v) {
#if defined(__AVX__)
  asm("" : "+x"(v));
#endif
  return v;
}

inline float horizontal_sum(Vec8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

inline float cutoff_of(const PackedQueries& queries, int64_t query, float norm, const ScanBound& bound) {
  return queries.thresholds[query] - bound.gamma_div4 * (queries.norms_x4[query] * norm);
}

// p_0 to p_3 and p_4 to p_7 of the canonical sum.
struct CanonicalSum {
  Double4 low = {}, high = {};

  void add(Vec8 a, Vec8 b) {
    Float4 x[2], y[2];
    __builtin_memcpy(x, &a, sizeof a);
    __builtin_memcpy(y, &b, sizeof b);
    low += __builtin_convertvector(x[0], Double4) * __builtin_convertvector(y[0], Double4);
    high += __builtin_convertvector(x[1], Double4) * __builtin_convertvector(y[1], Double4);
  }
};

template <class T>
float canonical_score_of(const float* query, const T* row, int64_t dim) {
  CanonicalSum sum;
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    sum.add(load8(query + d), load8(row + d));
  }
  if (d < dim) {
    sum.add(load_tail(query, d, dim), load_tail(row, d, dim));
  }
  const Double4 p = sum.low + sum.high;
  return static_cast<float>((p[0] + p[2]) + (p[1] + p[3])) + 0.0f;
}

}  // namespace
}  // namespace realm_kernels
