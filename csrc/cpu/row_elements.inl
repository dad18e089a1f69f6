// Rows of any of the three types as vectors of float32. Included, by way of a kernel's body, by its file for
// each instruction set, which sets kWidth: floats in a vector.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace realm_kernels {
namespace {

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef uint32_t UInt8 __attribute__((vector_size(32)));
typedef uint16_t Half8 __attribute__((vector_size(16)));

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

}  // namespace
}  // namespace realm_kernels
