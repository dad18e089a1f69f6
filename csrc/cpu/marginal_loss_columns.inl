// The mathematics of marginal_loss on kLanes columns at a time, all float64. A column is what one document is
// drawn for: a token in mode "token", a whole sequence otherwise.
//
// The documents of a group of columns lie in the workspace, [K][kLanes], and are walked three times: largest
// posterior, sum, result. Only the second takes exponentials, one a document (two where the best document has
// a small prior), in the forward as in the backward. The formulas are those of `marginal` in
// realm_kernels/marginal_loss/reference.py, where they are explained, but for r, see centre_columns.
#include <stdint.h>

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

inline double sum_of(const Vec& x) {
  double sum = 0.0;
  for (int j = 0; j < kLanes; ++j) sum += x[j];
  return sum;
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

// One group of columns, [K] vectors each.
struct Columns {
  Vec* log_prior;  // -inf where masked
  Vec* prior;
  Vec* log_likelihood;  // -inf where masked
  Vec* shifted;         // written by centre_columns, read by posterior_of
  Vec* d_relevance;     // of the backward: one sum a lane in mode "token"
};

constexpr int kArrays = 5;

inline Columns columns_in(double* workspace, int64_t documents) {
  Vec* first = reinterpret_cast<Vec*>(workspace);
  return {first, first + documents, first + 2 * documents, first + 3 * documents, first + 4 * documents};
}

// The lanes of x as one number: NaN where there is one, else the largest.
inline double largest_of(const Vec& x) {
  double top = x[0];
  for (int j = 1; j < kLanes; ++j) top = (x[j] > top) | (x[j] != x[j]) ? x[j] : top;
  return top;
}

// From relevance in log_prior to log_prior and prior, `count` vectors each: a softmax of every lane, or of
// all lanes together where kAcross. Returns where there is any document.
template <bool kAcross>
Mask normalise(int64_t count, Vec* log_prior, Vec* prior) {
  Vec top = splat(-kInfinity);
  for (int64_t k = 0; k < count; ++k) {
    const Vec u = log_prior[k];
    top = ((u > top) | (u != u)) ? u : top;
  }
  Mask empty = top == -kInfinity;
  if (kAcross) {
    const double largest = largest_of(top);
    top = splat(largest);
    empty = Mask{} - int64_t{largest == -kInfinity};
  }
  const Vec shift = empty ? splat(0.0) : top;
  Vec total = splat(0.0);
  for (int64_t k = 0; k < count; ++k) {
    prior[k] = exponential(log_prior[k] - shift).exp;
    total += prior[k];
  }
  if (kAcross) total = splat(sum_of(total));
  total = empty ? splat(1.0) : total;
  const Vec log_total = log_of(total), share = 1.0 / total;
  for (int64_t k = 0; k < count; ++k) {
    log_prior[k] = (log_prior[k] - shift) - log_total;
    prior[k] *= share;
  }
  return ~empty;
}

// What a group of columns has in common: where its likelihoods are centred.
struct Centre {
  Vec log_likelihood;  // of k*, the document of the largest posterior
  Vec sum;             // S
  Vec total;           // sum of joint
  Vec share;           // 1 / total
  Vec log_unit;        // of joint: 0, or log_prior_k* in the lanes that are deep
  Mask far;            // S <= -1/2: the best document has a small prior
  Mask deep;           // so small that joint is taken relative to it
  Mask impossible;     // every document has likelihood zero
};

inline Mask is_near(Vec d) { return (d < 1.0) & (d > -1.0); }

// With joint_k = exp(log_prior + d) and e_k = joint_k - prior, every result follows without another
// exponential: the posterior is joint_k / sum of joint, and r_k = (e_k - prior S) / (1 + S) where S > -1/2.
// What that subtraction rounds is an ulp of prior, as it is in d - L' itself, and k*, of at least 1 / K of
// the posterior, pulls by |S| / 2K or more. In the far lanes k* has twice its prior or more, 1 / K at least,
// and the plain difference loses as little.
inline Centre centre_columns(int64_t documents, const Columns& c) {
  Vec best = splat(-kInfinity), centre = splat(0.0), log_prior_best = splat(0.0);
  for (int64_t k = 0; k < documents; ++k) {
    const Vec joint = c.log_prior[k] + c.log_likelihood[k];
    const Mask better = (joint > best) | (joint != joint);  // NaN wins, and so reaches the result
    best = better ? joint : best;
    centre = better ? c.log_likelihood[k] : centre;
    log_prior_best = better ? c.log_prior[k] : log_prior_best;
  }
  // shifted = e_k = prior x expm1(d) where near, joint_k elsewhere.
  Vec sum = splat(0.0), total = splat(0.0);
  for (int64_t k = 0; k < documents; ++k) {
    const Vec d = c.log_likelihood[k] - centre, prior = c.prior[k];
    const Mask near = is_near(d);
    const Exponential e = exponential(near ? d : c.log_prior[k] + d);
    const Vec shifted = near ? prior * e.expm1 : e.exp;
    c.shifted[k] = shifted;
    sum += near ? shifted : shifted - prior;
    total += near ? shifted + prior : shifted;
  }
  const Mask far = sum <= -0.5;
  // Below exp(-30) documents that matter little beside k* could be lost below the smallest double.
  const Mask deep = far & (log_prior_best < -30.0);
  if (any(deep)) {
    total = deep ? splat(0.0) : total;
    for (int64_t k = 0; k < documents; ++k) {
      const Vec d = c.log_likelihood[k] - centre;
      const Vec joint = exponential((c.log_prior[k] - log_prior_best) + d).exp;
      total += deep ? joint : splat(0.0);
      c.shifted[k] = deep ? joint : c.shifted[k];
    }
  }
  total = far ? total : sum + 1.0;
  const Vec log_unit = deep ? log_prior_best : splat(0.0);
  return {centre, sum, total, 1.0 / total, log_unit, far, deep, best == -kInfinity};
}

// log p(y|x).
inline Vec log_marginal(const Centre& centre) {
  const Vec sum = (centre.far | centre.impossible) ? splat(0.0) : centre.sum;
  Vec relative = log1p_of(sum);  // L'
  const Mask far = centre.far & ~centre.impossible;
  if (any(far)) {
    relative = far ? centre.log_unit + log_of(centre.total) : relative;
  }
  return centre.impossible ? splat(-kInfinity) : centre.log_likelihood + relative;
}

// Posterior (joint) and residual r (change) of document k.
struct Shifted {
  Vec change;
  Vec joint;
};

inline Shifted posterior_of(const Columns& c, int64_t k, const Centre& centre) {
  const Mask near = is_near(c.log_likelihood[k] - centre.log_likelihood) & ~centre.deep;
  const Vec prior = c.prior[k], shifted = c.shifted[k];
  const Vec posterior = (near ? prior + shifted : shifted) * centre.share;
  const Vec e = near ? shifted : shifted - prior;
  return {centre.far ? posterior - prior : (e - prior * centre.sum) * centre.share, posterior};
}

}  // namespace
}  // namespace realm_kernels
