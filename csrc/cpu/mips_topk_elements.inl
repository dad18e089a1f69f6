// Rows of any of the three types as vectors of float32, and the canonical score. Part of mips_topk_body.inl.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/mips_topk_kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace realm_kernels {
namespace {

constexpr int64_t kLineBytes = 64;  // of a cache line

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef uint32_t UInt8 __attribute__((vector_size(32)));
typedef uint16_t Half8 __attribute__((vector_size(16)));
typedef float Float4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));

template <class V, class T>
inline V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Eight elements of a row as float32. Both conversions are exact.
inline Vec8 load8(const float* row) { return load<Vec8>(row); }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec8 load8(const BFloat16* row) {
  const UInt8 bits = __builtin_convertvector(load<Half8>(row), UInt8) << 16;
  return (Vec8)bits;
}

inline Vec8 load8(const Float16* row) {
#if defined(__F16C__)
  return (Vec8)_mm256_cvtph_ps((__m128i)load<Half8>(row));
#else
  const UInt8 half = __builtin_convertvector(load<Half8>(row), UInt8);
  const UInt8 magnitude = (half & 0x7fffu) << 13;
  // Scaling by 2^112 rebases the exponent, of subnormals too; infinities and NaN keep an exponent of all
  // ones.
  const Vec8 scaled = (Vec8)magnitude * 0x1p112f;
  const UInt8 special = (UInt8)((half & 0x7c00u) == 0x7c00u);
  const UInt8 bits = ((UInt8)scaled & ~special) | ((magnitude | 0x7f800000u) & special);
  return (Vec8)(bits | ((half & 0x8000u) << 16));
#endif
}

// Elements [from, dim) of a row, fewer than eight, with zeros behind them.
template <class T>
inline Vec8 load_tail(const T* row, int64_t from, int64_t dim) {
  T tail[8];
  __builtin_memset(tail, 0, sizeof tail);
  __builtin_memcpy(tail, row + from, static_cast<size_t>(dim - from) * sizeof(T));
  return load8(tail);
}

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

template <class T>
inline Vec8 load_any(const T* row, int64_t from, int64_t dim) {
  return from + 8 <= dim ? load8(row + from) : load_tail(row, from, dim);
}

// Of each half of a and b: elements 0 and 1 interleaved, elements 2 and 3 interleaved; the first pairs, the
// second pairs; then the lower halves and the upper ones. One instruction each.
inline Vec8 low_ones(Vec8 a, Vec8 b) { return __builtin_shuffle(a, b, Int8{0, 8, 1, 9, 4, 12, 5, 13}); }
inline Vec8 high_ones(Vec8 a, Vec8 b) { return __builtin_shuffle(a, b, Int8{2, 10, 3, 11, 6, 14, 7, 15}); }
inline Vec8 low_pairs(Vec8 a, Vec8 b) { return __builtin_shuffle(a, b, Int8{0, 1, 8, 9, 4, 5, 12, 13}); }
inline Vec8 high_pairs(Vec8 a, Vec8 b) { return __builtin_shuffle(a, b, Int8{2, 3, 10, 11, 6, 7, 14, 15}); }
inline Vec8 low_halves(Vec8 a, Vec8 b) { return __builtin_shuffle(a, b, Int8{0, 1, 2, 3, 8, 9, 10, 11}); }
inline Vec8 high_halves(Vec8 a, Vec8 b) { return __builtin_shuffle(a, b, Int8{4, 5, 6, 7, 12, 13, 14, 15}); }

inline void transpose8(Vec8 (&v)[8]) {
  const Vec8 a0 = low_ones(v[0], v[1]), a1 = high_ones(v[0], v[1]), a2 = low_ones(v[2], v[3]);
  const Vec8 a3 = high_ones(v[2], v[3]), a4 = low_ones(v[4], v[5]), a5 = high_ones(v[4], v[5]);
  const Vec8 a6 = low_ones(v[6], v[7]), a7 = high_ones(v[6], v[7]);
  const Vec8 b0 = low_pairs(a0, a2), b1 = high_pairs(a0, a2), b2 = low_pairs(a1, a3), b3 = high_pairs(a1, a3);
  const Vec8 b4 = low_pairs(a4, a6), b5 = high_pairs(a4, a6), b6 = low_pairs(a5, a7), b7 = high_pairs(a5, a7);
  v[0] = low_halves(b0, b4), v[1] = low_halves(b1, b5), v[2] = low_halves(b2, b6), v[3] = low_halves(b3, b7);
  v[4] = high_halves(b0, b4), v[5] = high_halves(b1, b5), v[6] = high_halves(b2, b6),
  v[7] = high_halves(b3, b7);
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
