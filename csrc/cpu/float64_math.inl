// Vectors of doubles: exp, expm1, log, log1p, sums and maxima of lanes. Included, by way of a kernel's body,
// by its file for each instruction set, which sets kLanes: doubles in a vector.
#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace realm_kernels {
namespace {

typedef double Vec __attribute__((vector_size(kLanes * sizeof(double))));
typedef int64_t Mask __attribute__((vector_size(kLanes * sizeof(int64_t))));  // all bits set: true
typedef uint64_t Bits __attribute__((vector_size(kLanes * sizeof(uint64_t))));

constexpr double kInfinity = __builtin_inf();

inline Vec splat(double value) { return Vec{} + value; }

inline Mask first_lanes(int lanes) {
  Mask place{};
  for (int j = 0; j < kLanes; ++j) place[j] = j;
  return place < int64_t{lanes};
}

inline bool any(const Mask& mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_pd((__m256d)mask) != 0;
#else
  for (int j = 0; j < kLanes; ++j) {
    if (mask[j]) return true;
  }
  return false;
#endif
}

// Whether a lane exceeds a bound; NaN does not. For loops in which almost never one does.
inline bool any_above(Vec x, double bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)x, (__m512d)splat(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_pd((__m256d)(x > bound)) != 0;
#else
  return any(x > bound);
#endif
}

// Upper half onto lower half, until one is left.
inline double sum_of(const Vec& x) {
#if defined(__AVX512F__)
  // By way of memory, because GCC 12 warns of what its intrinsics leave undefined.
  __m256d halves[2];
  memcpy(halves, &x, sizeof halves);
  const __m256d half = halves[0] + halves[1];
  const __m128d pair = _mm256_castpd256_pd128(half) + _mm256_extractf128_pd(half, 1);
  return pair[0] + pair[1];
#elif defined(__AVX__)
  const __m128d pair = _mm256_castpd256_pd128(x) + _mm256_extractf128_pd(x, 1);
  return pair[0] + pair[1];
#else
  double sum[kLanes];
  memcpy(sum, &x, sizeof sum);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  return sum[0];
#endif
}

// x = n h + r with |r| <= h / 2, and 2^(n h / ln 2): what is left of an exponential is a short polynomial in
// r.
struct Reduced {
  Vec r;
  Vec scale;
};

// Adding and subtracting 1.5 x 2^52 rounds to an integer, which then stands in the low bits of the sum.
constexpr double kRound = 0x1.8p52;
// log2(e), and ln 2 in two parts; the first has 21 trailing zero bits, so n times it is exact.
constexpr double kLog2E = 0x1.71547652b82fep0, kLn2High = 0x1.62e42fee00000p-1,
                 kLn2Low = 0x1.a39ef35793c76p-33;

#if defined(__AVX512F__)

// h = ln(2) / 16: two registers hold the powers of 2^(1/16), less j in the bits that shifting n leaves there.
inline Reduced reduce(Vec x) {
  constexpr Bits kLower = {0x3ff0000000000000, 0x3fefb5586cf9890f, 0x3fef72b83c7d517b, 0x3fef387a6e756238,
                           0x3fef06fe0a31b715, 0x3feedea64c123422, 0x3feebfdad5362a27, 0x3feeab07dd485429};
  constexpr Bits kUpper = {0x3feea09e667f3bcd, 0x3feea11473eb0187, 0x3feeace5422aa0db, 0x3feec49182a3f090,
                           0x3feee89f995ad3ad, 0x3fef199bdd85529c, 0x3fef5818dcfba487, 0x3fefa4afa2a490da};
  const Vec shifted = x * (16.0 * kLog2E) + kRound;
  const Vec n = shifted - kRound;
  const Bits power = __builtin_shuffle(kLower, kUpper, (Bits)shifted);
  return {(x - n * (kLn2High / 16.0)) - n * (kLn2Low / 16.0), (Vec)(power + ((Bits)shifted << 48))};
}

// The Taylor series of expm1 to r^7 / 7!: the next term is below 2^-54 of r.
inline Vec expm1_of_reduced(Vec r) {
  const Vec r2 = r * r;
  const Vec q2 = r * (1.0 / 6.0) + 0.5, q4 = r * (1.0 / 120.0) + 1.0 / 24.0;
  const Vec q6 = r * (1.0 / 5040.0) + 1.0 / 720.0;
  return ((q6 * r2 + q4) * r2 + q2) * r2 + r;
}

#else

// h = ln(2), as a table would be read lane by lane.
inline Reduced reduce(Vec x) {
  const Vec shifted = x * kLog2E + kRound;
  const Vec n = shifted - kRound;
  return {(x - n * kLn2High) - n * kLn2Low, (Vec)(((Mask)shifted << 52) + (int64_t{1023} << 52))};
}

// To r^13 / 13!: the next term is below 2^-56 of r. In pairs and pairs of pairs, so that few additions wait
// for each other: a loop over documents has only so many exponentials in flight.
inline Vec expm1_of_reduced(Vec r) {
  const Vec r2 = r * r, r4 = r2 * r2;
  const Vec q2 = r * (1.0 / 6.0) + 0.5, q4 = r * (1.0 / 120.0) + 1.0 / 24.0;
  const Vec q6 = r * (1.0 / 5040.0) + 1.0 / 720.0, q8 = r * (1.0 / 362880.0) + 1.0 / 40320.0;
  const Vec q10 = r * (1.0 / 39916800.0) + 1.0 / 3628800.0;
  const Vec q12 = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  Vec q = (q12 * r2 + q10) * r4 + (q8 * r2 + q6);
  q = q * r4 + (q4 * r2 + q2);
  return q * r2 + r;
}

#endif

struct Exponential {
  Vec exp;
  Vec expm1;
};

// exp(x) and exp(x) - 1 for x <= 700. Below -708, where the power of two would be subnormal, exp is taken for
// zero. NaN stays NaN. exp is good to about an ulp, and so is exp(x) - 1 where |x| < h / 2; beyond, what
// rounding the power of two costs grows by 1 / |x|: at most 2^-48 of it with the sixteen powers of AVX-512.
inline Exponential exponential(Vec x) {
  const Reduced reduced = reduce(x);
  const Vec q = expm1_of_reduced(reduced.r), scale = reduced.scale;
  const Mask vanishes = x < -708.0;
  return {vanishes ? splat(0.0) : scale * q + scale, vanishes ? splat(-1.0) : scale * q + (scale - 1.0)};
}

// log(x + low) for normal x > 0 and |low| below half an ulp of x, to about one ulp: fdlibm's series in f / (2
// + f), after x = 2^e (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2). Infinity and NaN stay; zero is not served.
inline Vec log_of(Vec x, Vec low) {
  constexpr uint64_t kOne = 0x3ff0000000000000, kRootHalf = 0x3fe6a09e667f3bcd,
                     kFraction = 0x000fffffffffffff;
  const Bits lifted = (Bits)x + (kOne - kRootHalf);
  // An integer below 2^52 under the exponent of 2^52 is that integer, once 2^52 is taken off.
  const Vec e = (Vec)((lifted >> 52) | uint64_t{0x4330000000000000}) - (0x1p52 + 1023.0);
  const Vec f = (Vec)((lifted & kFraction) + kRootHalf) - 1.0;
  const Vec s = f / (f + 2.0), z = s * s, half_square = 0.5 * f * f;
  Vec q = splat(1.479819860511658591e-01);
  q = q * z + 1.531383769920937332e-01;
  q = q * z + 1.818357216161805012e-01;
  q = q * z + 2.222219843214978396e-01;
  q = q * z + 2.857142874366239149e-01;
  q = q * z + 3.999999999940941908e-01;
  q = q * z + 6.666666666666735130e-01;
  const Vec tail = s * (half_square + z * q) + (e * kLn2Low + low / x);
  const Vec result = e * kLn2High - ((half_square - tail) - f);
  return x < kInfinity ? result : x;
}

inline Vec log_of(Vec x) { return log_of(x, splat(0.0)); }

// log(1 + x) for x > -1 + 2^-50: what rounding 1 + x loses is carried along.
inline Vec log1p_of(Vec x) {
  const Vec sum = x + 1.0, added = sum - 1.0;
  return log_of(sum, (1.0 - (sum - added)) + (x - added));
}

// The largest lane in every lane, where none is NaN. Without a branch: which lane it is, nothing foretells.
inline Vec largest_in_all(Vec x) {
  Mask place{};
  for (int j = 0; j < kLanes; ++j) place[j] = j;
  for (int half = kLanes / 2; half > 0; half /= 2) {
    const Vec other = __builtin_shuffle(x, place ^ int64_t{half});
    x = other > x ? other : x;
  }
  return x;
}

// The lanes of x as one number: NaN where there is one, else the largest.
inline double largest_of(const Vec& x) { return any(x != x) ? __builtin_nan("") : largest_in_all(x)[0]; }

inline Vec larger(Vec top, Vec x) { return ((x > top) | (x != x)) ? x : top; }

}  // namespace
}  // namespace realm_kernels
