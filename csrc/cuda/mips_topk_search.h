// The kernels around the scan of mips_topk: prepare, select, rescore, repair. Launched in this order with the
// scan second, five launches whatever the sizes; nothing is allocated and nobody waits. Bodies only: the
// launches are in mips_topk.cu, and tests/cuda_model runs the bodies on a CPU. The last two are in
// mips_topk_rescore.h.
#pragma once

#include <type_traits>

#include "cuda/mips_topk_top.h"

namespace realm_kernels {
namespace cuda {

// The caller's arguments, the plan, and the arrays of the workspace. Of T tiles t are kept for a query, and
// of their groups at most m rescored.
struct SearchArguments : MipsTopkParams {
  // Bound of |s~ - q^.x| / (|q^| |x|); with codes, of what a float64 sum of D products may lose.
  double relative;
  int num_tiles, num_groups;
  int64_t pitch;          // of words
  int kept;               // t
  int selected;           // m
  int visit_step;         // order of the tiles: coprime to how many rounds select makes
  int parts;              // blocks that share a query's repair
  int64_t scanned_pitch;  // of the scanned queries, in elements

  // In the workspace.
  void* scanned;         // [B, scanned_pitch] queries in scan precision, zero beyond D
  QueryBound* bounds;    // [B]
  QuadBound* coarse;     // [B] the same for quads
  uint32_t* words;       // [B, pitch] maxima of a tile's groups
  float* quad_norm;      // [T / 4] largest norm of the rows of four tiles; unused with codes
  CodeQuad* quad_codes;  // [T / 4] with codes
  int32_t* tiles;        // [B, t] that were kept, -1 where there are fewer
  int32_t* chosen;       // [B, m] groups
  int32_t* num_chosen;   // [B]
  int64_t* left_out;     // [B] key of (U, group) of the best group that may matter and was not chosen
  float* floor;          // [B] what k rows score at least, as far as the kept tiles tell
  int64_t* candidates;   // [B, m * 32] keys of (score, row)
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

// Step, residual norm, code norm.
RK_DEVICE const float* bounds_of_codes(const SearchArguments& a, int64_t row) {
  return a.code_bounds + 3 * (row / a.code_group);
}

// Quads are made ready for the scan: norms at 0, which it raises, or what select needs of the codes.
RK_DEVICE void prepare_quads(const SearchArguments& a) {
  const int quads = ceil_div(a.num_tiles, kQuad), step = static_cast<int>(gridDim.x * blockDim.x);
  const int rows = a.code_group < kTileRows ? a.code_group : kTileRows;  // that have the same bounds
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < quads; i += step) {
    if (a.mean == nullptr) {
      a.quad_norm[i] = 0.0f;
      continue;
    }
    CodeQuad quad{infinity(), 0.0f, 0.0f, 0.0f};
    const int end = i + 1 < quads ? (i + 1) << kQuadShift : a.num_rows;
    for (int row = i << kQuadShift; row < end; row += rows) {
      const float* of_codes = bounds_of_codes(a, row);
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

// U of a group, from the word of its tile.
RK_DEVICE float group_bound(const SearchArguments& a, const QueryBound& q, uint32_t word, int group) {
  const bool has_row = maximum_of(word) != -infinity();
  const double product = maximum_of(word, group % kTileGroups);
  const int64_t row = static_cast<int64_t>(group) * kGroupRows;
  if (a.mean != nullptr) {
    const float* of_codes = bounds_of_codes(a, row);
    return upper_bound(q, product, has_row, of_codes[0], of_codes[2], of_codes[1]);
  }
  return upper_bound(q, product, has_row, 1.0, a.quad_norm[row >> kQuadShift], 0.0);
}

RK_DEVICE uint32_t word_of(const SearchArguments& a, int b, int tile) { return a.words[b * a.pitch + tile]; }

// The largest U of the groups of a tile. Of rows as they are all groups have one error.
template <bool kCodes>
RK_DEVICE float tile_bound(const SearchArguments& a, const QueryBound& q, uint32_t word, int tile) {
  if constexpr (!kCodes) {
    const float maximum = maximum_of(word);
    return upper_bound(q, maximum, maximum != -infinity(), 1.0, a.quad_norm[tile / kQuad], 0.0);
  }
  float bound = -infinity();
#pragma unroll 1
  for (int group = tile * kTileGroups; group < (tile + 1) * kTileGroups && group < a.num_groups; ++group) {
    bound = fmaxf(bound, group_bound(a, q, word, group));
  }
  return bound;
}

// What the best row of a tile scores at least, if it may be returned; -inf where that is not known. It lies
// in one of the groups whose maximum may be the tile's.
RK_DEVICE float lower_bound(const SearchArguments& a, const QueryBound& q, uint32_t word, int tile) {
  if (maximum_of(word) == -infinity()) {
    return -infinity();
  }
  float least = infinity();
#pragma unroll 1
  for (int group = tile * kTileGroups; group < (tile + 1) * kTileGroups && group < a.num_groups; ++group) {
    if (maximum_of(word, group % kTileGroups) == maximum_of(word)) {
      const int64_t row = static_cast<int64_t>(group) * kGroupRows;
      double scale = 1.0, error = q.own;
      if (a.mean != nullptr) {
        const float* of_codes = bounds_of_codes(a, row);
        scale = of_codes[0];
        error += q.of_norm * of_codes[2] + q.of_residual * of_codes[1];
      } else {
        error += q.of_norm * a.quad_norm[row >> kQuadShift];
      }
      const double score = q.shift + q.factor * scale * least_maximum_of(word);
      const float bound = error < kOverflow ? round_down_to_float(score - error) + 0.0f : -infinity();
      least = fminf(least, bound);
    }
  }
  return least < infinity() ? least : -infinity();
}

// What select reads of a quad: four words, and what bounds their error.
template <bool kCodes>
struct Quad {
  Vector16 words;
  std::conditional_t<kCodes, CodeQuad, float> of_rows;

  RK_DEVICE void load(const SearchArguments& a, int b, int quad) {
    words = reinterpret_cast<const Vector16*>(a.words)[b * (a.pitch / kQuad) + quad];
    if constexpr (kCodes) {
      of_rows = a.quad_codes[quad];
    } else {
      of_rows = a.quad_norm[quad];
    }
  }
  RK_DEVICE float bound(const QuadBound& q) const {
    const uint32_t* w = words.words;
    const float maximum =
        fmaxf(fmaxf(maximum_of(w[0]), maximum_of(w[1])), fmaxf(maximum_of(w[2]), maximum_of(w[3])));
    if constexpr (kCodes) {
      return q.of_codes(maximum, of_rows);
    } else {
      return q.of_rows(maximum, of_rows);
    }
  }
};

// The floor of a query: of the kept tiles, the least of the k + E best lower bounds. Groups and rows that
// cannot reach it need not be read; whether k rows did reach it rescore sees for itself.
RK_DEVICE float find_floor(const SearchArguments& a, const QueryBound& q, int b, const int32_t* tiles) {
  const int threads = static_cast<int>(blockDim.x), keep = a.k + a.num_excluded;
  if (keep > a.kept) {
    return -infinity();
  }
  TopKeys<kGroupKeys> top(dynamic_shared_memory(), keep);
  for (int first = 0; first < a.kept; first += threads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int tile = i < a.kept ? tiles[i] : -1;
    const float bound = tile >= 0 ? lower_bound(a, q, word_of(a, b, tile), tile) : -infinity();
    top.offer(bound > -infinity() ? key_of(bound, tile) : kNothing);
    top.end_round();
  }
  const int found = top.finish();
  const int64_t least = top.smallest(found);
  return found == keep ? value_of(least) : -infinity();
}

// Of the kept tiles the groups that may reach the floor, the m with the largest U; returns the best of what
// is left.
RK_DEVICE int64_t choose_groups(const SearchArguments& a, const QueryBound& q, int b, const int32_t* tiles,
                                float floor) {
  const int threads = static_cast<int>(blockDim.x);
  TopKeys<kGroupKeys> top(dynamic_shared_memory(), a.selected + 1);  // and the best of those left out
  for (int first = 0; first < a.kept; first += threads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int tile = i < a.kept ? tiles[i] : -1;
    const uint32_t word = tile >= 0 ? word_of(a, b, tile) : 0;
#pragma unroll 1
    for (int j = 0; j < kTileGroups; ++j) {
      const int group = tile * kTileGroups + j;
      const float bound = tile >= 0 && group < a.num_groups ? group_bound(a, q, word, group) : -infinity();
      top.offer(bound > -infinity() && bound >= floor ? key_of(bound, group) : kNothing);
    }
    top.end_round();
  }
  const int count = top.finish();
  const int64_t left = count > a.selected ? top.smallest(count) : kNothing;
  for (int i = static_cast<int>(threadIdx.x); i < a.selected && i < count; i += threads) {
    const int64_t key = top.keys()[i] != left ? top.keys()[i] : top.keys()[a.selected];
    a.chosen[static_cast<int64_t>(b) * a.selected + i] = index_of(key);
  }
  if (threadIdx.x == 0) {
    a.num_chosen[b] = count < a.selected ? count : a.selected;
  }
  return left;
}

// A block keeps the t tiles of one query with the largest U; ties go to the smaller tile. Few quads reach the
// floor of that selection: of the others nothing more is computed. Visits come in a scattered order, so that
// a sorted table does not fill the buffer visit after visit. Reads 5 T bytes, with codes 8. Then it chooses
// from the groups of these tiles.
template <bool kCodes>
RK_DEVICE void select(const SearchArguments& a) {
  constexpr int kVisits = 4;  // of quads whose words a thread has under way at once
  const int b = static_cast<int>(blockIdx.x), threads = static_cast<int>(blockDim.x);
  TopKeys<kGroupKeys> top(dynamic_shared_memory(), a.kept + 1);  // and the best of those left out
  const QueryBound q = a.bounds[b];
  const QuadBound coarse = a.coarse[b];
  const int quads = ceil_div(a.num_tiles, kQuad);
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
          const int tile = quad[i] * kQuad + j;
          const float bound = may_enter && tile < a.num_tiles
                                  ? tile_bound<kCodes>(a, q, word_of(a, b, tile), tile)
                                  : -infinity();
          top.offer(bound > -infinity() ? key_of(bound, tile * kTileGroups) : kNothing);
        }
      }
      top.end_round();
    }
  }
  const int count = top.finish();
  const int64_t left = count > a.kept ? top.smallest(count) : kNothing;
  int32_t* tiles = a.tiles + static_cast<int64_t>(b) * a.kept;
  for (int i = static_cast<int>(threadIdx.x); i < a.kept; i += threads) {
    const int64_t key = i >= count ? kNothing : top.keys()[i] != left ? top.keys()[i] : top.keys()[a.kept];
    tiles[i] = key != kNothing ? index_of(key) / kTileGroups : -1;
  }
  __syncthreads();
  const float floor = find_floor(a, q, b, tiles);
  const int64_t group_left = choose_groups(a, q, b, tiles, floor);
  if (threadIdx.x == 0) {
    a.left_out[b] = Largest{}(left, group_left);
    a.floor[b] = floor;
  }
}

}  // namespace cuda
}  // namespace realm_kernels
