// The body of mips_topk's CPU kernels, included once by each mips_topk_<isa>.cpp, which sets kWidth and
// kQueryGroup.
//
// A panel is 2 * kWidth rows, packed [D][2 * kWidth]. scan_panel keeps 2 x kQueryGroup accumulators in
// registers: for each dimension it loads two vectors of rows and broadcasts one value of each query, so 2 *
// kQueryGroup multiply-adds follow 2 + kQueryGroup loads, and the multiply-add units are the limit (docs:
// realm_kernels/mips_topk/README.md).
//
// Written in GCC's vector extension, which GCC and clang lower to any width and architecture. Nothing here
// may instantiate a template or inline function of another header: the linker could keep a copy built for
// AVX-512.

#include <cstdint>
#include <cstring>

#include "cpu/mips_topk_kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace realm_kernels {
namespace {

constexpr int kPanelRows = 2 * kWidth;
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

template <class T>
float pack_panel_of(const T* rows, int64_t row_stride, int64_t n, int64_t dim, float* panel) {
  float largest = 0.0f;
  for (int64_t first = 0; first < kPanelRows; first += 8) {
    Vec8 squares = {};
    for (int64_t d = 0; d < dim; d += 8) {
      Vec8 v[8];
      for (int64_t r = 0; r < 8; ++r) {
        v[r] = first + r < n ? load_any(rows + (first + r) * row_stride, d, dim) : Vec8{};
      }
      transpose8(v);
      const int64_t width = dim - d < 8 ? dim - d : 8;
      for (int64_t j = 0; j < width; ++j) {
        squares += v[j] * v[j];
        store(panel + (d + j) * kPanelRows + first, v[j]);
      }
    }
    for (int r = 0; r < 8; ++r) {
      if (squares[r] > largest || squares[r] != squares[r]) {
        largest = squares[r];
      }
    }
  }
  return largest;
}

// A bit for each row whose score is not below the cutoff; NaN counts as not below.
inline uint32_t not_below(Vec low, Vec high, float cutoff) {
#if defined(__AVX512F__)
  const __m512 c = _mm512_set1_ps(cutoff);
  return static_cast<uint32_t>(_mm512_cmp_ps_mask((__m512)low, c, _CMP_NLT_UQ)) |
         static_cast<uint32_t>(_mm512_cmp_ps_mask((__m512)high, c, _CMP_NLT_UQ)) << 16;
#elif defined(__AVX2__)
  const __m256 c = _mm256_set1_ps(cutoff);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)low, c, _CMP_NLT_UQ))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)high, c, _CMP_NLT_UQ))) << 8;
#else
  uint32_t bits = 0;
  for (int r = 0; r < kWidth; ++r) {
    bits |= static_cast<uint32_t>(!(low[r] < cutoff)) << r | static_cast<uint32_t>(!(high[r] < cutoff))
                                                                 << (r + kWidth);
  }
  return bits;
#endif
}

inline float cutoff_of(const PackedQueries& queries, int64_t query, float norm, const ScanBound& bound) {
  return queries.thresholds[query] - bound.gamma_div4 * (queries.norms_x4[query] * norm);
}

// Scores of one panel and kQueries queries, packed [D][kQueries], while `lines` cache lines from `ask` on are
// fetched: one after each dimension, since a burst of requests would stall the loads behind it.
template <int kQueries>
inline int64_t scan_group(const float* panel, float norm, int64_t dim, const float* packed,
                          int64_t first_query, const PackedQueries& queries, const ScanBound& bound,
                          const char* ask, int64_t lines, PanelHit* hits) {
  Vec low[kQueries] = {}, high[kQueries] = {};
  const auto step = [&](int64_t d) __attribute__((always_inline)) {
    const Vec rows_low = load<Vec>(panel + d * kPanelRows);
    const Vec rows_high = load<Vec>(panel + d * kPanelRows + kWidth);
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      const float value = packed[d * kQueries + q];
      low[q] += rows_low * value;
      high[q] += rows_high * value;
    }
  };
  int64_t d = 0;
  for (; d < lines && d < dim; ++d) {
    __builtin_prefetch(ask + d * kLineBytes);
    step(d);
  }
  for (; d < dim; ++d) {
    step(d);
  }
  int64_t count = 0;
#pragma GCC unroll 16
  for (int q = 0; q < kQueries; ++q) {
    const uint32_t rows = not_below(low[q], high[q], cutoff_of(queries, first_query + q, norm, bound));
    if (rows != 0) {
      hits[count++] = {static_cast<int32_t>(first_query + q), rows};
    }
  }
  return count;
}

// The last group of a batch is smaller: count down to the instantiation of its size.
template <int kQueries>
inline int64_t scan_last_group(int64_t size, const float* panel, float norm, int64_t dim, const float* packed,
                               int64_t first_query, const PackedQueries& queries, const ScanBound& bound,
                               const char* ask, int64_t lines, PanelHit* hits) {
  if constexpr (kQueries > 0) {
    if (size == kQueries) {
      return scan_group<kQueries>(panel, norm, dim, packed, first_query, queries, bound, ask, lines, hits);
    }
    return scan_last_group<kQueries - 1>(size, panel, norm, dim, packed, first_query, queries, bound, ask,
                                         lines, hits);
  }
  return 0;
}

int64_t scan_panel(const float* panel, float norm, int64_t dim, const PackedQueries& queries,
                   const ScanBound& bound, NextRows next, PanelHit* hits) {
  // Packing waits for memory and scanning does not: the rows of the next panel are asked for while this one
  // is scanned, a share with each group of queries.
  const int64_t groups = (queries.batch + kQueryGroup - 1) / kQueryGroup;
  const int64_t lines = (next.bytes / kLineBytes + groups - 1) / groups;
  const char* ask = static_cast<const char*>(next.rows);
  int64_t count = 0, q = 0;
  for (; q + kQueryGroup <= queries.batch; q += kQueryGroup, ask += lines * kLineBytes) {
    count += scan_group<kQueryGroup>(panel, norm, dim, queries.packed + q * dim, q, queries, bound, ask,
                                     lines, hits + count);
  }
  return count + scan_last_group<kQueryGroup - 1>(queries.batch - q, panel, norm, dim,
                                                  queries.packed + q * dim, q, queries, bound, ask, lines,
                                                  hits + count);
}

// The sums of eight accumulators, one in each lane.
inline Vec8 horizontal_sums(Vec8 (&v)[8]) {
  transpose8(v);
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// A bit for each lane that is not below its cutoff; NaN counts as not below.
inline uint32_t not_below8(Vec8 scores, Vec8 cutoffs) {
#if defined(__AVX2__)
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)scores, (__m256)cutoffs, _CMP_NLT_UQ)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < 8; ++lane) {
    bits |= static_cast<uint32_t>(!(scores[lane] < cutoffs[lane])) << lane;
  }
  return bits;
#endif
}

// kQueries queries against rows as they lie, 8 / (kQueries + 1) rows at a time: with the squared norms that
// makes at most eight accumulators, whose sums one transpose gives. Memory is the limit here, so what comes
// next is asked for early, and line after line: in the order of the loads, which alternate between rows, it
// came at little more than half of the speed.
template <int kQueries, class T>
int64_t scan_rows_of(const T* rows, int64_t row_stride, int64_t n, int64_t dim, const PackedQueries& queries,
                     const ScanBound& bound, PanelHit* hits) {
  constexpr int kRows = 8 / (kQueries + 1);
  constexpr int64_t kAhead = 8192;  // bytes
  constexpr int64_t kStepBytes = kRows * 16 * static_cast<int64_t>(sizeof(T));
  uint32_t found[kQueries] = {};
  for (int64_t first = 0; first < n; first += kRows) {
    const T* row[kRows];
    for (int r = 0; r < kRows; ++r) {  // beyond the last row: the last again, its bit is not kept
      row[r] = rows + (first + r < n ? first + r : n - 1) * row_stride;
    }
    Vec8 sums[8] = {};  // of query q and row r at q * kRows + r, then the squared norms
    const auto step = [&](int64_t d, auto&& load_row) __attribute__((always_inline)) {
      Vec8 x[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        x[r] = load_row(row[r]);
        sums[kQueries * kRows + r] += x[r] * x[r];
      }
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) {
        const Vec8 query = load<Vec8>(queries.padded + q * queries.padded_dim + d);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sums[q * kRows + r] += x[r] * query;
        }
      }
    };
    const char* ask = reinterpret_cast<const char*>(row[0]) + kAhead;
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16, ask += kStepBytes) {
#pragma GCC unroll 8
      for (int64_t line = 0; line < kStepBytes; line += kLineBytes) {
        __builtin_prefetch(ask + line);
      }
      step(d, [d](const T* from) { return load8(from + d); });
      step(d + 8, [d](const T* from) { return load8(from + d + 8); });
    }
    for (; d < dim; d += 8) {
      step(d, [d, dim](const T* from) { return load_any(from, d, dim); });
    }
    const Vec8 totals = horizontal_sums(sums);
    float square = 0.0f;
    for (int r = 0; r < kRows; ++r) {
      const float candidate = totals[kQueries * kRows + r];
      square = candidate > square || candidate != candidate ? candidate : square;
    }
    const float norm = static_cast<float>(__builtin_sqrt(square * bound.norm_growth + bound.norm_floor));
    Vec8 cutoffs = {};
    for (int q = 0; q < kQueries && q < queries.batch; ++q) {
      const float cutoff = cutoff_of(queries, q, norm, bound);
      for (int r = 0; r < kRows; ++r) {
        cutoffs[q * kRows + r] = cutoff;
      }
    }
    const uint32_t bits = not_below8(totals, cutoffs);
    constexpr uint32_t kRowBits = (1u << kRows) - 1;
    for (int q = 0; q < kQueries && q < queries.batch; ++q) {
      found[q] |= (bits >> (q * kRows) & kRowBits) << first;
    }
  }
  int64_t count = 0;
  for (int q = 0; q < kQueries; ++q) {
    if (found[q] != 0) {
      hits[count++] = {q, found[q]};
    }
  }
  return count;
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

// The one switch over the table's dtype.
template <class Function>
inline auto with_rows(const void* rows, ScalarType type, Function&& function) {
  switch (type) {
    case ScalarType::kBFloat16:
      return function(static_cast<const BFloat16*>(rows));
    case ScalarType::kFloat16:
      return function(static_cast<const Float16*>(rows));
    default:
      return function(static_cast<const float*>(rows));
  }
}

float pack_panel(const void* rows, ScalarType type, int64_t row_stride, int64_t n, int64_t dim,
                 float* panel) {
  return with_rows(rows, type, [&](auto* typed) { return pack_panel_of(typed, row_stride, n, dim, panel); });
}

int64_t scan_rows(const void* rows, ScalarType type, int64_t row_stride, int64_t n, int64_t dim,
                  const PackedQueries& queries, const ScanBound& bound, PanelHit* hits) {
  return with_rows(rows, type, [&](auto* typed) {
    if (queries.batch == 1) {
      return scan_rows_of<1>(typed, row_stride, n, dim, queries, bound, hits);
    }
    if (queries.batch <= 3) {
      return scan_rows_of<3>(typed, row_stride, n, dim, queries, bound, hits);
    }
    return scan_rows_of<7>(typed, row_stride, n, dim, queries, bound, hits);
  });
}

float canonical_score(const float* query, const void* row, ScalarType type, int64_t dim) {
  return with_rows(row, type, [&](auto* typed) { return canonical_score_of(query, typed, dim); });
}

constexpr MipsTopkKernels kKernels = {kPanelRows, kQueryGroup,    7, pack_panel, scan_panel,
                                      scan_rows,  canonical_score};

}  // namespace
}  // namespace realm_kernels
