// The mathematics of marginal_loss on one vector at a time, all float64. A column is what one document is
// drawn for: a token in mode "token", a whole sequence otherwise. The lanes of a vector are documents of one
// column (kAcross) or columns that share their documents' prior, in mode "token".
//
// The documents are walked twice for the prior (largest, sum) and three times for the columns: largest
// posterior, sum, result. A document costs one exponential for its prior and one a column, in the forward as
// in the backward (two a column where the best document has a small prior). The formulas are those of
// `marginal` in realm_kernels/marginal_loss/reference.py, where they are explained, but for r, see
// centre_columns, and for the prior: it stays a mass, exp(s - largest s), and its sum Z divides sums, not
// terms.
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

inline bool any(const Mask& mask) {
  for (int j = 0; j < kLanes; ++j) {
    if (mask[j]) return true;
  }
  return false;
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

struct Exponential {
  Vec exp;
  Vec expm1;
};

// exp(x) and exp(x) - 1 for x <= 1, each to about one ulp, from one polynomial: x = n ln 2 + r, |r| <= ln(2)
// / 2, exp(x) = 2^n + 2^n expm1(r). Below -708, where 2^n would be subnormal, exp is taken for zero. NaN
// stays NaN.
inline Exponential exponential(Vec x) {
  constexpr double kLowest = -708.0;
  // Adding and subtracting 1.5 x 2^52 rounds to an integer, which then stands in the low bits of the sum.
  constexpr double kRound = 0x1.8p52;
  const Mask vanishes = x < kLowest;
  const Vec bounded = vanishes ? splat(kLowest) : x;
  const Vec shifted = bounded * 0x1.71547652b82fep0 + kRound;  // log2(e)
  const Vec n = shifted - kRound;
  // ln 2 in two parts; the first has 21 trailing zero bits, so n times it is exact.
  const Vec r = (bounded - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  // The Taylor series to r^13 / 13!: the next term is below 2^-56 of r. In pairs and pairs of pairs, so that
  // few additions wait for each other: a loop over documents has only so many exponentials in flight.
  const Vec r2 = r * r, r4 = r2 * r2;
  const Vec q2 = r * (1.0 / 6.0) + 0.5, q4 = r * (1.0 / 120.0) + 1.0 / 24.0;
  const Vec q6 = r * (1.0 / 5040.0) + 1.0 / 720.0, q8 = r * (1.0 / 362880.0) + 1.0 / 40320.0;
  const Vec q10 = r * (1.0 / 39916800.0) + 1.0 / 3628800.0;
  const Vec q12 = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  Vec q = (q12 * r2 + q10) * r4 + (q8 * r2 + q6);
  q = q * r4 + (q4 * r2 + q2);
  q = q * r2 + r;  // expm1(r)
  const Vec scale = (Vec)(((Mask)shifted << 52) + (int64_t{1023} << 52));
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
  const Vec tail = s * (half_square + z * q) + (e * 0x1.a39ef35793c76p-33 + low / x);
  const Vec result = e * 0x1.62e42fee00000p-1 - ((half_square - tail) - f);
  return x < kInfinity ? result : x;
}

inline Vec log_of(Vec x) { return log_of(x, splat(0.0)); }

// log(1 + x) for x > -1 + 2^-50: what rounding 1 + x loses is carried along.
inline Vec log1p_of(Vec x) {
  const Vec sum = x + 1.0, added = sum - 1.0;
  return log_of(sum, (1.0 - (sum - added)) + (x - added));
}

// The lanes of x as one number: NaN where there is one, else the largest.
inline double largest_of(const Vec& x) {
  double top = x[0];
  for (int j = 1; j < kLanes; ++j) top = (x[j] > top) | (x[j] != x[j]) ? x[j] : top;
  return top;
}

inline Vec larger(Vec top, Vec x) { return ((x > top) | (x != x)) ? x : top; }

// The documents of one example; lanes beyond K hold -inf and 0.
struct Prior {
  Vec* relevance;  // s + log w less the largest, -inf where masked
  Vec* mass;       // exp(relevance)
  double total;    // Z, the sum of mass; 1 where there is no document
  bool exists;     // whether there is a document
};

// From s + log w in prior.relevance.
inline void normalise(int64_t vectors, Prior& prior) {
  Vec top = splat(-kInfinity);
  for (int64_t v = 0; v < vectors; ++v) top = larger(top, prior.relevance[v]);
  const double largest = largest_of(top);
  prior.exists = largest != -kInfinity;
  const double shift = prior.exists ? largest : 0.0;
  Vec total = splat(0.0);
  for (int64_t v = 0; v < vectors; ++v) {
    const Vec u = prior.relevance[v];
    // A masked document stays one where another's score is NaN.
    const Vec relevance = u == -kInfinity ? u : u - shift;
    const Vec mass = exponential(relevance).exp;
    prior.relevance[v] = relevance;
    prior.mass[v] = mass;
    total += mass;
  }
  prior.total = prior.exists ? sum_of(total) : 1.0;
}

// One vector of columns, or one column across vectors of documents.
struct Columns {
  Prior prior;
  Vec* log_likelihood;
  Vec* shifted;      // written by centre_columns, read by posterior_of
  Vec* d_relevance;  // of the backward: one sum a lane in mode "token"
  Vec loss;
};

template <bool kAcross>
inline Vec document(const Vec* values, int64_t k) {
  return kAcross ? values[k] : splat(reinterpret_cast<const double*>(values)[k]);
}

// What the columns of a vector have in common: where their likelihoods are centred.
struct Centre {
  Vec log_likelihood;  // of k*, the document of the largest posterior
  Vec sum;             // S
  Vec total;           // sum of joint
  Vec share;           // 1 / total
  Vec log_unit;        // of joint / Z: what the logarithm of their quotient is short of
  Mask far;            // S <= -1/2: the best document has a small prior
  Mask deep;           // so small that joint is taken relative to it
  Mask impossible;     // every document has likelihood zero
};

inline Mask is_near(Vec d) { return (d < 1.0) & (d > -1.0); }

struct Best {
  Vec joint, log_likelihood, relevance;
};

// The best lane in every lane.
inline Best best_of_lanes(const Best& best) {
  int j = 0;
  for (int i = 1; i < kLanes; ++i) {
    if ((best.joint[i] > best.joint[j]) | (best.joint[i] != best.joint[i])) j = i;
  }
  return {splat(best.joint[j]), splat(best.log_likelihood[j]), splat(best.relevance[j])};
}

// With joint_k = mass exp(d) and e_k = joint_k - mass, every result follows without another exponential: the
// posterior is joint_k / sum of joint, and r_k = (e_k - mass S) / (Z (1 + S)) where S > -1/2. What that
// subtraction rounds is an ulp of the prior, as it is in d - L' itself, and k*, of at least 1 / K of the
// posterior, pulls by |S| / 2K or more. In the far lanes k* has twice its prior or more, 1 / K at least, and
// the plain difference loses as little.
//
// count: K, or the vectors of documents across which one column lies.
template <bool kAcross>
Centre centre_columns(int64_t count, const Columns& c) {
  Best best{splat(-kInfinity), splat(0.0), splat(0.0)};
  for (int64_t k = 0; k < count; ++k) {
    const Vec relevance = document<kAcross>(c.prior.relevance, k);
    // What a masked document holds is read, but never looked at.
    const Vec log_likelihood = relevance == -kInfinity ? relevance : c.log_likelihood[k];
    c.log_likelihood[k] = log_likelihood;
    const Vec joint = relevance + log_likelihood;
    const Mask better = (joint > best.joint) | (joint != joint);  // NaN wins, and so reaches the result
    best.joint = better ? joint : best.joint;
    best.log_likelihood = better ? log_likelihood : best.log_likelihood;
    best.relevance = better ? relevance : best.relevance;
  }
  if (kAcross) best = best_of_lanes(best);
  // shifted = e_k = mass x expm1(d) where near, joint_k elsewhere.
  Vec change = splat(0.0), total = splat(0.0);
  for (int64_t k = 0; k < count; ++k) {
    const Vec d = c.log_likelihood[k] - best.log_likelihood, mass = document<kAcross>(c.prior.mass, k);
    const Mask near = is_near(d);
    const Exponential e = exponential(near ? d : document<kAcross>(c.prior.relevance, k) + d);
    const Vec shifted = near ? mass * e.expm1 : e.exp;
    c.shifted[k] = shifted;
    change += near ? shifted : shifted - mass;
    total += near ? shifted + mass : shifted;
  }
  if (kAcross) {
    change = splat(sum_of(change));
    total = splat(sum_of(total));
  }
  const Vec sum = change / c.prior.total;
  const Mask far = sum <= -0.5;
  // Below exp(-30) documents that matter little beside k* could be lost below the smallest double.
  const Mask deep = far & (best.relevance < -30.0);
  if (any(deep)) {
    Vec deep_total = splat(0.0);
    for (int64_t k = 0; k < count; ++k) {
      const Vec d = c.log_likelihood[k] - best.log_likelihood;
      const Vec joint = exponential((document<kAcross>(c.prior.relevance, k) - best.relevance) + d).exp;
      deep_total += joint;
      c.shifted[k] = deep ? joint : c.shifted[k];
    }
    if (kAcross) deep_total = splat(sum_of(deep_total));
    total = deep ? deep_total : total;
  }
  total = far ? total : change + c.prior.total;
  const Vec log_unit = deep ? best.relevance : splat(0.0);
  return {best.log_likelihood, sum, total, 1.0 / total, log_unit, far, deep, best.joint == -kInfinity};
}

// log p(y|x).
inline Vec log_marginal(const Columns& c, const Centre& centre) {
  const Vec sum = (centre.far | centre.impossible) ? splat(0.0) : centre.sum;
  Vec relative = log1p_of(sum);  // L'
  const Mask far = centre.far & ~centre.impossible;
  if (any(far)) {
    relative = far ? centre.log_unit + log_of(centre.total / c.prior.total) : relative;
  }
  return centre.impossible ? splat(-kInfinity) : centre.log_likelihood + relative;
}

// Posterior (joint) and residual r (change) of document k.
struct Shifted {
  Vec change;
  Vec joint;
};

template <bool kAcross>
inline Shifted posterior_of(const Columns& c, int64_t k, const Centre& centre) {
  const Mask near = is_near(c.log_likelihood[k] - centre.log_likelihood) & ~centre.deep;
  const Vec mass = document<kAcross>(c.prior.mass, k), shifted = c.shifted[k];
  const Vec posterior = (near ? mass + shifted : shifted) * centre.share;
  const Vec e = near ? shifted : shifted - mass;
  const Vec plain = posterior - mass / c.prior.total;
  return {centre.far ? plain : (e - mass * centre.sum) * centre.share, posterior};
}

}  // namespace
}  // namespace realm_kernels
