// The kernels around the scan of mips_topk: prepare, select, rescore, repair. Launched in this order with the
// scan second, five launches whatever the sizes; nothing is allocated and nobody waits. Bodies only: the
// launches are in mips_topk.cu, and tests/cuda_model runs the bodies on a CPU. The last two are in
// mips_topk_rescore.h.
#pragma once

#include <type_traits>

#include "cuda/mips_topk_top.h"

namespace realm_kernels {
namespace cuda {

// The caller's arguments, the plan, and the arrays of the workspace. G rows of a group, m groups rescored.
struct SearchArguments : MipsTopkParams {
  // Bound of |s~ - q^.x| / (|q^| |x|); with codes, of what a float64 sum of D products may lose.
  double relative;
  int group, num_groups;
  int64_t pitch;          // of group_max, in groups
  int selected;           // m
  int visit_step;         // order of the groups: coprime to how many rounds select makes
  int parts;              // blocks that share a query's repair
  int64_t scanned_pitch;  // of the scanned queries, in elements

  // In the workspace.
  void* scanned;         // [B, scanned_pitch] queries in scan precision, zero beyond D
  QueryBound* bounds;    // [B]
  QuadBound* coarse;     // [B] the same for quads
  void* group_max;       // [B, pitch] float32, with codes int32
  float* quad_norm;      // [N / 4 G] largest norm of the rows of four groups; unused with codes
  CodeQuad* quad_codes;  // [N / 4 G] with codes
  int32_t* chosen;       // [B, m] groups, -1 where there are fewer
  int64_t* left_out;     // [B] key of (U, group) of the best group not chosen
  float* floor;          // [B] with codes: what k rows score at least, as far as the chosen groups tell
  int64_t* candidates;   // [B, m * G] keys of (score, row)
  int64_t* kth;          // [B] key of the k-th row
  int64_t* repaired;     // [B, parts, k] keys
  int32_t* flagged;      // [B], the first num_flagged are queries to repair
  int32_t* arrived;      // [B + 1] blocks that are done with a query; the last one is num_flagged
};

template <class T, class Combine>
RK_DEVICE T block_reduce(T x, T* partial, Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    partial[threadIdx.x / 32] = x;
  }
  __syncthreads();
  x = partial[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
    x = combine(x, partial[warp]);
  }
  return x;
}

struct Add {
  RK_DEVICE double operator()(double a, double b) const { return a + b; }
};
struct Most {
  RK_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

constexpr double kSmallest = 0x1p-126;  // below it hardware may flush
constexpr double kSmallestStep = 0x1p-60;
constexpr double kUp = 1 + 0x1p-40;  // what the float64 sums and products below may have lost

// Quads are made ready for the scan: norms at 0, which it raises, or what select needs of the codes.
RK_DEVICE void prepare_quads(const SearchArguments& a) {
  const int quads = ceil_div(a.num_groups, kQuad), step = static_cast<int>(gridDim.x * blockDim.x);
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < quads; i += step) {
    if (a.mean == nullptr) {
      a.quad_norm[i] = 0.0f;
      continue;
    }
    CodeQuad quad{infinity(), 0.0f, 0.0f, 0.0f};
    for (int group = kQuad * i; group < kQuad * (i + 1) && group < a.num_groups; ++group) {
      const float* of_codes = a.code_bounds + 3 * (static_cast<int64_t>(group) * a.group / a.code_group);
      quad = {fminf(quad.least_step, of_codes[0]), fmaxf(quad.step, of_codes[0]),
              fmaxf(quad.norm, of_codes[2]), fmaxf(quad.residual, of_codes[1])};
    }
    a.quad_codes[i] = quad;
  }
}

// A block rounds one query to scan precision and bounds what that costs, where there is one for it, and takes
// its share of the quads. Reads B D, writes as much.
RK_DEVICE void prepare(const SearchArguments& a, bool is_float16) {
  prepare_quads(a);
  if (static_cast<int>(blockIdx.x) >= a.batch) {
    return;
  }
  auto* partial = reinterpret_cast<double*>(dynamic_shared_memory());
  auto* partial_float = reinterpret_cast<float*>(partial + kMaxWarps);
  const int b = static_cast<int>(blockIdx.x);
  const auto threads = static_cast<int>(blockDim.x);
  const auto query = [&](int d) {
    return load_number(a.queries, a.query_type, b * a.query_stride + d * a.query_stride_d);
  };
  const bool has_codes = a.mean != nullptr;
  float step = 1.0f;
  if (has_codes) {
    float largest = 0.0f;
    for (int d = static_cast<int>(threadIdx.x); d < a.dim; d += threads) {
      largest = fmaxf(largest, fabsf(query(d)));
    }
    largest = block_reduce(largest, partial_float, Most{}) / 127.0f;
    step = largest < infinity() ? fmaxf(largest, static_cast<float>(kSmallestStep)) : 1.0f;
  }
  double square = 0.0, residual_square = 0.0, scanned_square = 0.0, mean_square = 0.0, centre = 0.0;
  for (int d = static_cast<int>(threadIdx.x); d < a.scanned_pitch; d += threads) {
    const float q = d < a.dim ? query(d) : 0.0f;
    double rounded;
    if (has_codes) {
      const float code = rintf(q / step);
      // Any integer will do: one of a query with an infinity or NaN is never looked at.
      const int c = fabsf(code) <= 127.0f ? static_cast<int>(code) : 0;
      static_cast<int8_t*>(a.scanned)[b * a.scanned_pitch + d] = static_cast<int8_t>(c);
      rounded = static_cast<double>(step) * c;
      const double mean = d < a.dim ? static_cast<double>(a.mean[d]) : 0.0;
      mean_square += mean * mean;
      centre += static_cast<double>(q) * mean;
    } else {
      uint32_t bits = to_bfloat16(q);
      if (is_float16) {
        bits = d < a.dim ? static_cast<const uint16_t*>(a.queries)[b * a.query_stride + d * a.query_stride_d]
                         : 0;
      }
      static_cast<uint16_t*>(a.scanned)[b * a.scanned_pitch + d] = static_cast<uint16_t>(bits);
      rounded = is_float16 ? half_to_float(bits) : bfloat16_to_float(bits);
    }
    // Equal infinities leave no residual, NaN leaves NaN.
    const double residual = rounded == static_cast<double>(q) ? 0.0 : static_cast<double>(q) - rounded;
    square += static_cast<double>(q) * static_cast<double>(q);
    residual_square += residual * residual;
    scanned_square += rounded * rounded;
  }
  square = block_reduce(square, partial, Add{});
  residual_square = block_reduce(residual_square, partial, Add{});
  scanned_square = block_reduce(scanned_square, partial, Add{});
  mean_square = block_reduce(mean_square, partial, Add{});
  centre = block_reduce(centre, partial, Add{});
  if (threadIdx.x == 0) {
    const double norm = sqrt(square) * kUp, residual = sqrt(residual_square) * kUp;
    QueryBound bound{1.0, 0.0, 0.0, 0.0, 0.0};
    if (square == 0.0) {
      // Every score is 0, exactly.
    } else if (has_codes) {
      const double lost = a.relative * norm;
      bound = {step, centre, residual + lost, norm + lost, 2 * lost * sqrt(mean_square) * kUp + 0x1p-140};
    } else {
      const double flushed = a.dim * kSmallest;
      const double scanned_norm = sqrt(scanned_square) * kUp;
      bound = {1.0, 0.0, (scanned_norm * a.relative + residual + flushed) * kUp, 0.0,
               (scanned_norm * flushed + 2 * flushed) * kUp};
    }
    a.bounds[b] = bound;
    a.coarse[b] = QuadBound::of(bound);
    a.arrived[b] = 0;
    if (b == 0) {
      a.arrived[a.batch] = 0;
    }
  }
}

// U of a group, from what the scan left.
RK_DEVICE float group_bound(const SearchArguments& a, const QueryBound& q, int b, int group) {
  const int64_t place = b * a.pitch + group;
  if (a.mean != nullptr) {
    const int32_t product = static_cast<const int32_t*>(a.group_max)[place];
    const float* of_codes = a.code_bounds + 3 * (static_cast<int64_t>(group) * a.group / a.code_group);
    return upper_bound(q, product, product != INT32_MIN, of_codes[0], of_codes[2], of_codes[1]);
  }
  const float product = static_cast<const float*>(a.group_max)[place];
  return upper_bound(q, product, product != -infinity(), 1.0, a.quad_norm[group / kQuad], 0.0);
}

RK_DEVICE int largest(int a, int b) { return a > b ? a : b; }

// What select reads of a quad: four maxima, as bits, and what bounds their error.
template <bool kCodes>
struct Quad {
  Vector16 maxima;
  std::conditional_t<kCodes, CodeQuad, float> of_rows;

  RK_DEVICE void load(const SearchArguments& a, int b, int quad) {
    maxima = static_cast<const Vector16*>(a.group_max)[b * (a.pitch / kQuad) + quad];
    if constexpr (kCodes) {
      of_rows = a.quad_codes[quad];
    } else {
      of_rows = a.quad_norm[quad];
    }
  }
  RK_DEVICE float bound(const QuadBound& q) const {
    const uint32_t* m = maxima.words;
    if constexpr (kCodes) {
      return q.of_codes(largest(largest(m[0], m[1]), largest(m[2], m[3])), of_rows);
    } else {
      return q.of_rows(fmaxf(fmaxf(__uint_as_float(m[0]), __uint_as_float(m[1])),
                             fmaxf(__uint_as_float(m[2]), __uint_as_float(m[3]))),
                       of_rows);
    }
  }
};

// What the best row of a group scores at least, if it may be returned; -inf where that is not known.
RK_DEVICE float lower_bound(const SearchArguments& a, const QueryBound& q, int b, int group) {
  const int32_t product = static_cast<const int32_t*>(a.group_max)[b * a.pitch + group];
  const float* of_codes = a.code_bounds + 3 * (static_cast<int64_t>(group) * a.group / a.code_group);
  const double error = q.of_norm * of_codes[2] + q.of_residual * of_codes[1] + q.own;
  const double score = q.shift + q.factor * of_codes[0] * product;
  return product != INT32_MIN && error < kOverflow ? round_down_to_float(score - error) + 0.0f : -infinity();
}

// The floor of a query: of the chosen groups, the least of the k + E best lower bounds. Rows that cannot
// reach it need not be read; whether k rows did reach it rescore sees for itself.
RK_DEVICE void find_floor(const SearchArguments& a, const QueryBound& q, int b, int chosen) {
  const int threads = static_cast<int>(blockDim.x), keep = a.k + a.num_excluded;
  __syncthreads();  // the keys of the selection are no longer read
  TopKeys<kGroupKeys> top(dynamic_shared_memory(), keep < a.selected ? keep : a.selected);
  for (int first = 0; first < a.selected; first += threads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int group = i < a.selected ? a.chosen[static_cast<int64_t>(b) * a.selected + i] : -1;
    const float bound = group >= 0 ? lower_bound(a, q, b, group) : -infinity();
    top.offer(bound > -infinity() ? key_of(bound, group) : kNothing);
    top.end_round();
  }
  const int found = top.finish();
  const int64_t least = top.smallest(found);
  if (threadIdx.x == 0) {
    a.floor[b] = found == keep && keep <= chosen ? value_of(least) : -infinity();
  }
}

// A block chooses the m groups of one query with the largest U; ties go to the smaller group. Few quads reach
// the floor: of the others nothing more is computed. Visits come in a scattered order, so that a sorted table
// does not fill the buffer visit after visit. Reads 5 N / G bytes, with codes 8.
template <bool kCodes>
RK_DEVICE void select(const SearchArguments& a) {
  constexpr int kVisits = 4;  // of quads whose maxima a thread has under way at once
  const int b = static_cast<int>(blockIdx.x), threads = static_cast<int>(blockDim.x);
  TopKeys<kGroupKeys> top(dynamic_shared_memory(), a.selected + 1);  // and the best of those left out
  const QueryBound q = a.bounds[b];
  const QuadBound coarse = a.coarse[b];
  const int quads = ceil_div(a.num_groups, kQuad);
  const int visits = q.of_norm == q.of_norm ? ceil_div(quads, threads) : 0;  // none for a NaN query
  int at = 0;
  for (int first = 0; first < visits; first += kVisits) {
    Quad<kCodes> found[kVisits];
    int quad[kVisits];
#pragma unroll
    for (int i = 0; i < kVisits; ++i) {
      quad[i] = first + i < visits ? at * threads + static_cast<int>(threadIdx.x) : quads;
      at += a.visit_step;
      at -= at >= visits ? visits : 0;
      if (quad[i] < quads) {
        found[i].load(a, b, quad[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kVisits; ++i) {
      const bool may_enter = quad[i] < quads && !(found[i].bound(coarse) < top.least_value());
      if (__any_sync(0xFFFFFFFFu, may_enter)) {
#pragma unroll 1
        for (int j = 0; j < kQuad; ++j) {
          const int group = quad[i] * kQuad + j;
          const float bound = may_enter && group < a.num_groups ? group_bound(a, q, b, group) : -infinity();
          top.offer(bound > -infinity() ? key_of(bound, group) : kNothing);
        }
      }
      top.end_round();
    }
  }
  const int count = top.finish();
  const int64_t left = count > a.selected ? top.smallest(count) : kNothing;
  for (int i = static_cast<int>(threadIdx.x); i < a.selected; i += threads) {
    const int64_t key = i >= count              ? kNothing
                        : top.keys()[i] != left ? top.keys()[i]
                                                : top.keys()[a.selected];
    a.chosen[static_cast<int64_t>(b) * a.selected + i] = key != kNothing ? index_of(key) : -1;
  }
  if (threadIdx.x == 0) {
    a.left_out[b] = left;
  }
  if constexpr (kCodes) {
    find_floor(a, q, b, count);
  }
}

}  // namespace cuda
}  // namespace realm_kernels
