// The kernels around the scan of mips_topk: prepare, select, rescore, repair. Launched in this order with the
// scan second, five launches whatever the sizes; nothing is allocated and nobody waits. Bodies only: the
// launches are in mips_topk_search.cu, and tests/cuda_model runs the bodies on a CPU.
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
  int64_t* candidates;   // [B, m * G] keys of (score, row)
  int64_t* kth;          // [B] key of the k-th row
  int64_t* repaired;     // [B, parts, k] keys
  int32_t* flagged;      // [B], the first num_flagged are queries to repair
  int32_t* arrived;      // [B + 1] blocks that are done with a query; the last one is num_flagged
};

// Shared memory of rescore and repair: the query in float64 behind the keys, and the groups a repair found.
RK_BOTH constexpr int64_t scoring_bytes(int threads, int dim) {
  return top_keys_bytes(threads, kRowKeys) + 8 * int64_t{dim} + 4 * (int64_t{threads} + 4);
}

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

// A block chooses the m groups of one query with the largest U; ties go to the smaller group. Few quads reach
// the floor: of the others nothing more is computed. Visits come in a scattered order, so that a sorted table
// does not fill the buffer visit after visit. Reads 5 N / G bytes, with codes 8.
template <bool kCodes>
RK_DEVICE void select(const SearchArguments& a) {
  constexpr int kVisits = kCodes ? 2 : 4;  // of quads whose maxima a thread has under way at once
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
}

RK_DEVICE void load_query(const SearchArguments& a, int b, double* query) {
  for (int d = static_cast<int>(threadIdx.x); d < a.dim; d += static_cast<int>(blockDim.x)) {
    query[d] = load_number(a.queries, a.query_type, b * a.query_stride + d * a.query_stride_d);
  }
  __syncthreads();
}

// The key of a row, kNothing where it may not be returned.
RK_DEVICE int64_t row_key(const SearchArguments& a, const double* query, int b, int row) {
  if (row < 0 || row >= a.num_rows || (a.row_mask != nullptr && !a.row_mask[row])) {
    return kNothing;
  }
  for (int e = 0; e < a.num_excluded; ++e) {
    if (a.exclude[b * a.exclude_stride + e * a.exclude_stride_e] == a.first_row + row) {
      return kNothing;
    }
  }
  const float score =
      a.row_type == Number::kFloat32
          ? canonical_score<Number::kFloat32>(query, a.rows, row, a.row_stride, a.dim, a.aligned)
      : a.row_type == Number::kBFloat16
          ? canonical_score<Number::kBFloat16>(query, a.rows, row, a.row_stride, a.dim, a.aligned)
          : canonical_score<Number::kFloat16>(query, a.rows, row, a.row_stride, a.dim, a.aligned);
  return score == score ? key_of(score, row) : kNothing;
}

// Whether this block is the last of `blocks` to be done with a query: then what the others wrote is visible.
RK_DEVICE bool is_last_block(const SearchArguments& a, int b, int blocks, int* told) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *told = atomicAdd(a.arrived + b, 1) == blocks - 1;
    if (*told) {
      a.arrived[b] = 0;  // for the repair, and the next search
    }
  }
  __syncthreads();
  __threadfence();
  return *told != 0;
}

// The k first of `count` keys that blocks wrote, in order, as the query's result; returns the k-th key.
RK_DEVICE int64_t write_first(const SearchArguments& a, TopKeys<kRowKeys>& top, int b, const int64_t* keys,
                              int64_t count) {
  top.clear();
  const auto threads = static_cast<int64_t>(blockDim.x);
  for (int64_t first = 0; first < count; first += kOffersPerRound * threads) {
#pragma unroll
    for (int i = 0; i < kOffersPerRound; ++i) {
      const int64_t place = first + i * threads + static_cast<int64_t>(threadIdx.x);
      top.offer(place < count ? load_from_others(keys + place) : kNothing);
    }
    top.end_round();
  }
  const int found = top.finish();
  top.sort(found);
  for (int i = static_cast<int>(threadIdx.x); i < a.k; i += static_cast<int>(blockDim.x)) {
    const int64_t key = i < found ? top.keys()[i] : kNothing;
    a.scores[static_cast<int64_t>(b) * a.k + i] = value_of(key);
    a.indices[static_cast<int64_t>(b) * a.k + i] = key == kNothing ? -1 : a.first_row + index_of(key);
  }
  return found == a.k ? top.keys()[a.k - 1] : kNothing;
}

// Blocks score the rows of a query's chosen groups, a row a thread; the last of them orders the keys, and
// certifies that no group left out can change the result, or flags the query. Reads B m G D row bytes: the
// gather bounds it.
RK_DEVICE void rescore(const SearchArguments& a) {
  const auto threads = static_cast<int>(blockDim.x);
  const int width = a.selected * a.group, blocks = ceil_div(width, threads);
  const int b = static_cast<int>(blockIdx.x) / blocks, part = static_cast<int>(blockIdx.x) % blocks;
  unsigned char* memory = dynamic_shared_memory();
  TopKeys<kRowKeys> top(memory, a.k);
  auto* query = reinterpret_cast<double*>(memory + top_keys_bytes(threads, kRowKeys));
  auto* told = reinterpret_cast<int*>(query + a.dim);
  load_query(a, b, query);
  int64_t* keys = a.candidates + static_cast<int64_t>(b) * width;
  const int position = part * threads + static_cast<int>(threadIdx.x);
  if (position < width) {
    const int group = a.chosen[static_cast<int64_t>(b) * a.selected + position / a.group];
    const int64_t row = group < 0 ? -1 : static_cast<int64_t>(group) * a.group + position % a.group;
    keys[position] = row < a.num_rows ? row_key(a, query, b, static_cast<int>(row)) : kNothing;
  }
  if (!is_last_block(a, b, blocks, told)) {
    return;
  }
  const int64_t last = write_first(a, top, b, keys, width);
  if (threadIdx.x == 0) {
    const int64_t left = a.left_out[b];
    // A group cannot matter if U < tau, or if U = tau and all its ids are larger. The high half of kNothing
    // is below every value: too few rows were found, and any group left out may hold one.
    const bool above = high_of(left) > high_of(last);
    const bool before =
        high_of(left) == high_of(last) && static_cast<int64_t>(index_of(left)) * a.group < index_of(last);
    a.kth[b] = last;
    if (left != kNothing && (above || before)) {
      a.flagged[atomicAdd(a.arrived + a.batch, 1)] = b;
      atomicAdd(a.repairs, 1ull);
    }
  }
}

// Every group whose U reaches the k-th score so far, for the queries that were flagged; without one a block
// reads four bytes and leaves. Blocks take (query, run of groups) in turn; the last one done with a query
// writes it anew.
RK_DEVICE void repair(const SearchArguments& a) {
  const int tasks = a.arrived[a.batch] * a.parts;
  const auto threads = static_cast<int>(blockDim.x);
  unsigned char* memory = dynamic_shared_memory();
  TopKeys<kRowKeys> top(memory, a.k);
  auto* query = reinterpret_cast<double*>(memory + top_keys_bytes(threads, kRowKeys));
  auto* told = reinterpret_cast<int*>(query + a.dim);
  int* found = told + 1;
  int* groups = told + 4;  // [threads]
  for (int task = static_cast<int>(blockIdx.x); task < tasks; task += static_cast<int>(gridDim.x)) {
    const int b = a.flagged[task / a.parts], part = task % a.parts;
    __syncthreads();  // the query of the task before is no longer read
    load_query(a, b, query);
    top.clear();
    const QueryBound q = a.bounds[b];
    const int64_t last = a.kth[b];
    const float tau = value_of(last);
    const int run = ceil_div(a.num_groups, a.parts);
    const int end = (part + 1) * run < a.num_groups ? (part + 1) * run : a.num_groups;
    for (int first = part * run; first < end; first += threads) {
      __syncthreads();
      if (threadIdx.x == 0) {
        *found = 0;
      }
      __syncthreads();
      const int group = first + static_cast<int>(threadIdx.x);
      const float bound = group < end ? group_bound(a, q, b, group) : -infinity();
      if (bound >= tau && bound > -infinity()) {
        groups[atomicAdd(found, 1)] = group;
      }
      __syncthreads();
      const int64_t rows = static_cast<int64_t>(*found) * a.group;
      for (int64_t start = 0; start < rows; start += threads) {
        const int64_t place = start + static_cast<int64_t>(threadIdx.x);
        int64_t key = kNothing;
        if (place < rows) {
          const int64_t row = static_cast<int64_t>(groups[place / a.group]) * a.group + place % a.group;
          key = row < a.num_rows ? row_key(a, query, b, static_cast<int>(row)) : kNothing;
        }
        top.offer(key >= last ? key : kNothing);  // behind the k-th so far nothing can come in
        top.end_round();
      }
    }
    const int count = top.finish();
    int64_t* keys = a.repaired + static_cast<int64_t>(b) * a.parts * a.k;
    for (int i = static_cast<int>(threadIdx.x); i < a.k; i += threads) {
      keys[static_cast<int64_t>(part) * a.k + i] = i < count ? top.keys()[i] : kNothing;
    }
    if (is_last_block(a, b, a.parts, told)) {
      write_first(a, top, b, keys, static_cast<int64_t>(a.parts) * a.k);
    }
  }
}

}  // namespace cuda
}  // namespace realm_kernels
