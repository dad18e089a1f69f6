// Rows packed for the register-blocked kernel, and the scan of many queries. Part of mips_topk_body.inl.
//
// A panel is 2 * kWidth rows, packed [D][2 * kWidth]. The scan keeps 2 x kQueryGroup accumulators in
// registers: for each dimension it loads two vectors of rows and broadcasts one value of each query, so 2 *
// kQueryGroup multiply-adds follow 2 + kQueryGroup loads, and the multiply-add units are the limit.
//
// Where the processor multiplies bfloat16, rows of it are packed in pairs, [D / 2 rounded up][2 * kWidth][2],
// and so are the queries, rounded: two multiply-adds an instruction. A pair takes the place of a float32 in
// all that only moves it.
#pragma once

#include <cstdint>

#include "cpu/mips_topk_elements.inl"
#include "cpu/mips_topk_kernels.h"

namespace realm_kernels {
namespace {

constexpr int kPanelRows = 2 * kWidth;

// Squared norms of rows first to first + 7.
inline void note_squares(Vec8 squares, int64_t first, PanelRows& rows) {
  for (int i = 0; i < 8; ++i) {
    rows.square = squares[i] > rows.square ? squares[i] : rows.square;
    rows.nan |= static_cast<uint32_t>(squares[i] != squares[i]) << (first + i);
  }
}

template <class T>
PanelRows pack_panel_of(const T* rows, int64_t row_stride, int64_t n, int64_t dim, float* panel) {
  PanelRows panel_rows = {0.0f, 0};
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
    note_squares(squares, first, panel_rows);
  }
  return panel_rows;
}

// The products of one dimension of float32, or of two of bfloat16, added to sums: those of a vector of rows
// and a query, or of vectors of both.
struct OneDimension {
  static Vec add(Vec sum, Vec rows, float query) { return sum + rows * query; }
  template <class V>
  static V add_products(V sum, V a, V b) {
    return sum + a * b;
  }
};

#if defined(__AVX512BF16__)
constexpr bool kBFloat16Pairs = true;
struct TwoDimensions {
  static Vec add(Vec sum, Vec rows, float query) {
    return add_products(sum, rows, (Vec)_mm512_set1_ps(query));
  }
  static Vec add_products(Vec sum, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#else
// Elsewhere the instruction is spelt out, for its tests; it is used where that is no slower than float32.
constexpr bool kBFloat16Pairs = kWidth == 4;
struct TwoDimensions {
  static Vec add(Vec sum, Vec rows, float query) {
    typedef uint32_t Bits __attribute__((vector_size(4 * kWidth)));
    uint32_t pair;
    __builtin_memcpy(&pair, &query, sizeof pair);
    return add_products(sum, rows, (Vec)(Bits{} + pair));
  }
  template <class V>
  static V add_products(V sum, V a, V b) {
    typedef uint32_t Bits __attribute__((vector_size(sizeof(V))));
    sum += (V)((Bits)a & 0xffff0000u) * (V)((Bits)b & 0xffff0000u);
    return sum + (V)((Bits)a << 16) * (V)((Bits)b << 16);
  }
};
#endif

// Adds the squares of pairs, and notes which are subnormal.
inline void note_pairs(UInt8 pairs, Vec8& squares, Int8& subnormal) {
  const UInt8 low = pairs << 16, high = pairs & 0xffff0000u;
  squares += (Vec8)low * (Vec8)low + (Vec8)high * (Vec8)high;
  subnormal |= ((low & 0x7f800000u) == 0) & ((low & 0x7fffffffu) != 0);
  subnormal |= ((high & 0x7f800000u) == 0) & ((high & 0x7fffffffu) != 0);
}

// Infinite where an element is subnormal: the instruction takes it for zero.
inline Vec8 squares_or_infinity(Vec8 squares, Int8 subnormal) {
  return (subnormal != 0) & (squares == squares) ? Vec8{} + __builtin_inff() : squares;
}

// Elements [from, from + 16) of a row as eight pairs, zeros beyond D.
inline Vec8 load_pairs(const BFloat16* row, int64_t from, int64_t dim) {
  if (from + 16 <= dim) {
    return load<Vec8>(row + from);
  }
  BFloat16 tail[16];
  __builtin_memset(tail, 0, sizeof tail);
  __builtin_memcpy(tail, row + from, static_cast<size_t>(dim - from) * sizeof(BFloat16));
  return load<Vec8>(tail);
}

// A panel of pairs.
PanelRows pack_pairs(const BFloat16* rows, int64_t row_stride, int64_t n, int64_t dim, float* panel) {
  PanelRows panel_rows = {0.0f, 0};
  for (int64_t first = 0; first < kPanelRows; first += 8) {
    Vec8 squares = {};
    Int8 subnormal = {};
    for (int64_t d = 0; d < dim; d += 16) {
      Vec8 v[8];
      for (int64_t r = 0; r < 8; ++r) {
        v[r] = first + r < n ? load_pairs(rows + (first + r) * row_stride, d, dim) : Vec8{};
      }
      transpose8(v);
      const int64_t pairs = dim - d < 16 ? (dim - d + 1) / 2 : 8;
      for (int64_t j = 0; j < pairs; ++j) {
        note_pairs((UInt8)v[j], squares, subnormal);
        store(panel + (d / 2 + j) * kPanelRows + first, v[j]);
      }
    }
    note_squares(squares_or_infinity(squares, subnormal), first, panel_rows);
  }
  return panel_rows;
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

// Scores of one panel and kQueries queries, packed [dim][kQueries] of what Step takes at a time, while
// `lines` cache lines from `ask` on are fetched: one after each dimension, since a burst of requests would
// stall the loads behind it.
template <class Step, int kQueries>
inline int64_t scan_group(const float* panel, float norm, uint32_t keep, int64_t dim, const float* packed,
                          int64_t first_query, const PackedQueries& queries, const ScanBound& bound,
                          const char* ask, int64_t lines, PanelHit* hits) {
  Vec low[kQueries] = {}, high[kQueries] = {};
  const auto step = [&](int64_t d) __attribute__((always_inline)) {
    const Vec rows_low = load<Vec>(panel + d * kPanelRows);
    const Vec rows_high = load<Vec>(panel + d * kPanelRows + kWidth);
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      const float value = packed[d * kQueries + q];
      low[q] = Step::add(low[q], rows_low, value);
      high[q] = Step::add(high[q], rows_high, value);
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
    const uint32_t rows = not_below(low[q], high[q], cutoff_of(queries, first_query + q, norm, bound)) & keep;
    if (rows != 0) {
      hits[count++] = {static_cast<int32_t>(first_query + q), rows};
    }
  }
  return count;
}

// Counts down to the instantiation for the size of a group.
template <class Step, int kQueries>
inline int64_t scan_group_of(int64_t size, const float* panel, float norm, uint32_t keep, int64_t dim,
                             const float* packed, int64_t first_query, const PackedQueries& queries,
                             const ScanBound& bound, const char* ask, int64_t lines, PanelHit* hits) {
  if constexpr (kQueries > 0) {
    if (size == kQueries) {
      return scan_group<Step, kQueries>(panel, norm, keep, dim, packed, first_query, queries, bound, ask,
                                        lines, hits);
    }
    return scan_group_of<Step, kQueries - 1>(size, panel, norm, keep, dim, packed, first_query, queries,
                                             bound, ask, lines, hits);
  }
  return 0;
}

template <class Step>
int64_t scan_panel_by(const float* panel, float norm, uint32_t keep, int64_t dim,
                      const PackedQueries& queries, const ScanBound& bound, NextRows next, PanelHit* hits) {
  // Packing waits for memory and scanning does not: the rows of the next panel are asked for while this one
  // is scanned, a share with each group of queries.
  const int64_t lines = (next.bytes / kLineBytes + queries.groups.count - 1) / queries.groups.count;
  const char* ask = static_cast<const char*>(next.rows);
  int64_t count = 0, q = 0;
  for (int64_t g = 0; g < queries.groups.count; ++g, ask += lines * kLineBytes) {
    const int64_t size = queries.groups.size + (g < queries.groups.larger ? 1 : 0);
    count += scan_group_of<Step, kQueryGroup>(size, panel, norm, keep, dim, queries.packed + q * dim, q,
                                              queries, bound, ask, lines, hits + count);
    q += size;
  }
  return count;
}

}  // namespace
}  // namespace realm_kernels
