// Rows packed for the register-blocked kernel, and the scan of many queries. Part of mips_topk_body.inl.
//
// A panel is 2 * kWidth rows, packed [D][2 * kWidth]. The scan keeps 2 x kQueryGroup accumulators in
// registers: for each dimension it loads two vectors of rows and broadcasts one value of each query, so 2 *
// kQueryGroup multiply-adds follow 2 + kQueryGroup loads, and the multiply-add units are the limit.
#pragma once

#include <cstdint>

#include "cpu/mips_topk_elements.inl"
#include "cpu/mips_topk_kernels.h"

namespace realm_kernels {
namespace {

constexpr int kPanelRows = 2 * kWidth;

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

// Counts down to the instantiation for the size of a group.
template <int kQueries>
inline int64_t scan_group_of(int64_t size, const float* panel, float norm, int64_t dim, const float* packed,
                             int64_t first_query, const PackedQueries& queries, const ScanBound& bound,
                             const char* ask, int64_t lines, PanelHit* hits) {
  if constexpr (kQueries > 0) {
    if (size == kQueries) {
      return scan_group<kQueries>(panel, norm, dim, packed, first_query, queries, bound, ask, lines, hits);
    }
    return scan_group_of<kQueries - 1>(size, panel, norm, dim, packed, first_query, queries, bound, ask,
                                       lines, hits);
  }
  return 0;
}

int64_t scan_panel(const float* panel, float norm, int64_t dim, const PackedQueries& queries,
                   const ScanBound& bound, NextRows next, PanelHit* hits) {
  // Packing waits for memory and scanning does not: the rows of the next panel are asked for while this one
  // is scanned, a share with each group of queries.
  const int64_t lines = (next.bytes / kLineBytes + queries.groups.count - 1) / queries.groups.count;
  const char* ask = static_cast<const char*>(next.rows);
  int64_t count = 0, q = 0;
  for (int64_t g = 0; g < queries.groups.count; ++g, ask += lines * kLineBytes) {
    const int64_t size = queries.groups.size + (g < queries.groups.larger ? 1 : 0);
    count += scan_group_of<kQueryGroup>(size, panel, norm, dim, queries.packed + q * dim, q, queries, bound,
                                        ask, lines, hits + count);
    q += size;
  }
  return count;
}

}  // namespace
}  // namespace realm_kernels
