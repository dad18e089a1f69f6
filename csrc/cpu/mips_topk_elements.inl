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
inline Pair load_tail16(const T* row, int64_t from, int64_t dim) {
  T tail[16];
  __builtin_memset(tail, 0, sizeof tail);
  __builtin_memcpy(tail, row + from, static_cast<size_t>(dim - from) * sizeof(T));
  return load16(tail);
}

template <class T>
inline Vec8 load_any(const T* row, int64_t from, int64_t dim) {
  return from + 8 <= dim ? load8(row + from) : load_tail(row, from, dim);
}

inline void transpose8(Vec8 (&v)[8]) {
  for (int i = 0; i < 8; i += 2) {  // pairs of rows: (0 8 2 10 ..), (1 9 3 11 ..)
    const Vec8 a = v[i], b = v[i + 1];
    v[i] = __builtin_shuffle(a, b, Int8{0, 8, 2, 10, 4, 12, 6, 14});
    v[i + 1] = __builtin_shuffle(a, b, Int8{1, 9, 3, 11, 5, 13, 7, 15});
  }
  for (int i = 0; i < 8; i += (i & 1) ? 3 : 1) {  // 0, 1, 4, 5
    const Vec8 a = v[i], b = v[i + 2];
    v[i] = __builtin_shuffle(a, b, Int8{0, 1, 8, 9, 4, 5, 12, 13});
    v[i + 2] = __builtin_shuffle(a, b, Int8{2, 3, 10, 11, 6, 7, 14, 15});
  }
  for (int i = 0; i < 4; ++i) {
    const Vec8 a = v[i], b = v[i + 4];
    v[i] = __builtin_shuffle(a, b, Int8{0, 1, 2, 3, 8, 9, 10, 11});
    v[i + 4] = __builtin_shuffle(a, b, Int8{4, 5, 6, 7, 12, 13, 14, 15});
  }
}

// The sums of eight accumulators, one in each lane.
inline Vec8 horizontal_sums(Vec8 (&v)[8]) {
  transpose8(v);
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

inline float horizontal_sum(Vec8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

inline float cutoff_of(const PackedQueries& queries, int64_t query, float norm, const ScanBound& bound) {
  return queries.thresholds[query] - bound.gamma_div4 * (queries.norms_x4[query] * norm);
}

template <class T>
float canonical_score_of(const float* query, const T* row, int64_t dim) {
  Double8 p = {};
  for (int64_t d = 0; d < dim; d += 8) {
    p += __builtin_convertvector(load_any(query, d, dim), Double8) *
         __builtin_convertvector(load_any(row, d, dim), Double8);
  }
  const double total = ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
  return static_cast<float>(total) + 0.0f;
}

}  // namespace
}  // namespace realm_kernels
