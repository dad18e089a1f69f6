// The mathematics of marginal_loss on one vector at a time, all float64. A column is what one document is
// drawn for: a token in mode "token", a whole sequence otherwise. The lanes of a vector are documents of one
// column (mode "sequence") or columns that share their documents' prior (mode "token").
//
// A column is walked three times: largest posterior, sums, results. The formulas are those of `marginal` in
// realm_kernels/marginal_loss/reference.py, where they are explained, but for r, see Column, and for the
// prior: it stays a mass, exp(s - largest s), and its sum Z divides sums, not terms.
#include "cpu/float64_math.inl"

namespace realm_kernels {
namespace {

// The documents of one example; lanes beyond K hold -inf.
struct Prior {
  Vec* relevance;  // s + log w, -inf where masked
  Vec* mass;       // exp(relevance - shift)
  double shift;    // the largest relevance; 0 where there is no document
  double total;    // Z, the sum of mass; 1 where there is no document
  double inverse;  // 1 / Z
  bool exists;     // whether there is a document
};

inline void finish_prior(double largest, double total, Prior& prior) {
  // Of documents that are all NaN the largest is -inf, but not the mass 0.
  prior.exists = largest != -kInfinity || total != 0.0;
  prior.total = prior.exists ? total : 1.0;
  prior.inverse = 1.0 / prior.total;
}

inline Vec mass_of(Vec relevance, double shift) { return exponential(relevance - shift).exp; }

// k*, the document of the largest posterior. NaN is passed over: it reaches the sums.
struct Best {
  Vec joint = splat(-kInfinity);  // relevance + log-likelihood
  Vec log_likelihood = splat(0.0);

  void see(Vec relevance, Vec other) {
    const Vec sum = relevance + other;
    const Mask better = sum > joint;
    joint = better ? sum : joint;
    log_likelihood = better ? other : log_likelihood;
  }

  // The best lane in every lane; of equal ones that of the largest likelihood.
  Best of_lanes() const {
    Best best;
    best.joint = largest_in_all(joint);
    best.log_likelihood = largest_in_all(joint == best.joint ? log_likelihood : splat(-kInfinity));
    return best;
  }
};

// joint_k = mass_k exp(d_k), and e_k = joint_k - mass_k by expm1, with d_k = l_k - l_k*.
struct Terms {
  Vec joint;
  Vec change;
};

// Above d = 600 a document has a mass below exp(-600), as its posterior is no larger than that of k*: the
// mass may have vanished where the product has not, so the exponents are added first. Below, what vanishes
// with the mass is less than exp(-100).
inline Terms terms_of(Vec relevance, double shift, Vec mass, Vec d) {
  constexpr double kHuge = 600.0;
  const Exponential e = exponential(d);
  Terms terms{mass * e.exp, mass * e.expm1};
  if (__builtin_expect(any_above(d, kHuge), 0)) {
    const Mask huge = d > kHuge;
    const Vec joint = exponential((relevance - shift) + d).exp;
    terms.joint = huge ? joint : terms.joint;
    terms.change = huge ? joint - mass : terms.change;
  }
  return terms;
}

// What the documents of a column have in common: with it every result follows from mass_k and d_k. The
// posterior is joint_k / sum of joint, and r_k = (e_k - mass_k S) / (Z (1 + S)) where S > -1/2. What that
// subtraction rounds is an ulp of the prior, as it is in d - L' itself, and k*, of at least 1 / K of the
// posterior, pulls by |S| / 2K or more. Elsewhere, in a far column, k* has twice its prior or more, 1 / K at
// least, and the plain difference loses as little.
struct Column {
  Vec log_likelihood;  // of k*
  Vec sum;             // S = sum of e_k / Z
  Vec share;           // 1 / sum of joint_k; 0 where the column pulls nothing
  Vec unit;            // in a deep column the relevance of k*, to which joint is relative, else NaN
};
constexpr int kColumnFields = 4;

inline Mask is_far(const Column& column) { return column.sum <= -0.5; }
inline Mask is_deep(const Column& column) { return column.unit == column.unit; }
inline Mask pulls(const Column& column) { return column.share != 0.0; }

// A far column is deep where k* has so little of the prior, exp(-30), that documents which matter little
// beside it could be lost below the smallest double.
constexpr double kDeep = -30.0;

// Of relevance and log-likelihood: exp of the joint less that of k*.
inline Vec deep_joint(Vec relevance, const Column& column, Vec d) {
  return exponential((relevance - column.unit) + d).exp;
}

// log p(y|x) but for its logarithms, which are taken of many columns at once.
struct Marginal {
  Vec log_likelihood;  // of k*
  Vec sum;             // S, where log p(y|x) = log_likelihood + log1p(S); else 0
  Vec ratio;           // where it is log_likelihood + log_unit + log(ratio); else 1
  Vec log_unit;        // else 0; -inf where every document has likelihood zero
};
constexpr int kMarginalFields = 4;

inline Vec log_marginal(const Marginal& m) {
  Vec relative = log1p_of(m.sum);
  const Mask apart = m.ratio != 1.0;
  if (any(apart)) relative = apart ? log_of(m.ratio) : relative;
  return m.log_likelihood + (m.log_unit + relative);
}

// From the sums over its documents; deep_total(column) sums deep_joint.
template <class DeepTotal>
inline Column finish_column(const Prior& prior, const Best& best, const Terms& sums, Marginal* marginal,
                            const DeepTotal& deep_total) {
  Column column{best.log_likelihood, sums.change * prior.inverse, splat(0.0),
                best.joint - best.log_likelihood};
  const Mask far = is_far(column);
  const Mask deep = far & (column.unit - prior.shift < kDeep);
  Vec total = far ? sums.joint : sums.change + prior.total;
  Vec log_unit = splat(0.0);
  if (any(deep)) {
    total = deep ? deep_total(column) : total;
    log_unit = deep ? column.unit - prior.shift : log_unit;
  }
  column.unit = deep ? column.unit : splat(__builtin_nan(""));
  // Every document has likelihood zero, and none is NaN.
  const Mask impossible = (best.joint == -kInfinity) & (sums.change == sums.change);
  column.share = impossible ? splat(0.0) : 1.0 / total;
  *marginal = {best.log_likelihood, (far | impossible) ? splat(0.0) : column.sum,
               far & ~impossible ? total * prior.inverse : splat(1.0),
               impossible ? splat(-kInfinity) : log_unit};
  return column;
}

// Of one document: its posterior, and r, what that gained on the prior.
struct Result {
  Vec posterior;
  Vec residual;
};

// far: whether a lane of the column is; terms.joint is that of deep_joint in deep lanes.
inline Result result_of(const Prior& prior, const Terms& terms, Vec mass, const Column& column, bool far) {
  const Vec posterior = terms.joint * column.share;
  Vec residual = (terms.change - mass * column.sum) * column.share;
  if (far) residual = is_far(column) ? posterior - mass * prior.inverse : residual;
  return {posterior, residual};
}

}  // namespace
}  // namespace realm_kernels
