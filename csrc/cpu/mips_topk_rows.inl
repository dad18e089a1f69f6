// Rows as they lie and a few queries: what packing would cost more than it saves. Part of mips_topk_body.inl.
//
// A tile is a few rows and up to four queries, so at most ten accumulators, whose sums one transpose gives.
// The rows come from memory once, with the first tile, which asks for what comes next early and line after
// line: in the order of the loads, which alternate between rows, it came at little more than half of the
// speed.
#pragma once

#include <cstdint>

#include "cpu/mips_topk_elements.inl"
#include "cpu/mips_topk_kernels.h"

namespace realm_kernels {
namespace {

constexpr int kDirectMax = 12;
constexpr int kTileQueries = 4;

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

// Inner products of kQueries queries and kRows rows, of query q and row r in lane q * kRows + r; with kFirst
// also the squared norms of the rows, and the requests for what comes next.
template <int kQueries, int kRows, bool kFirst, class T>
inline Vec8 tile_products(const T* const (&row)[kRows], int64_t dim, const float* queries, int64_t padded_dim,
                          float (&squares)[kRows]) {
  constexpr int kProducts = kQueries * kRows;
  constexpr bool kOneTranspose = kProducts + kRows <= 8;
  constexpr int64_t kAhead = 8192;  // bytes
  constexpr int64_t kStepBytes = kRows * 16 * static_cast<int64_t>(sizeof(T));
  Vec8 sums[8], norms[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    sums[i] = Vec8{};
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    norms[r] = Vec8{};
  }
  // Whichever are fewer, rows or queries, wait in registers for the others to come by.
  const auto step = [&](const T* const(&from)[kRows], int64_t offset,
                        int64_t d) __attribute__((always_inline)) {
    const float* const query = queries + d;
    if constexpr (kRows <= kQueries) {
      Pair x[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        x[r] = load16(from[r] + offset);
        if constexpr (kFirst) {
          norms[r] += x[r].first * x[r].first;
          norms[r] += x[r].second * x[r].second;
        }
      }
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
        const Vec8 first = in_register(load<Vec8>(query + q * padded_dim));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sums[q * kRows + r] += x[r].first * first;
        }
        const Vec8 second = in_register(load<Vec8>(query + q * padded_dim + 8));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sums[q * kRows + r] += x[r].second * second;
        }
      }
    } else {
      static_assert(kQueries == 1, "a tile of one query");
      const Vec8 first = in_register(load<Vec8>(query)), second = in_register(load<Vec8>(query + 8));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Pair x = load16(from[r] + offset);
        sums[r] += x.first * first;
        norms[r] += x.first * x.first;
        sums[r] += x.second * second;
        norms[r] += x.second * x.second;
      }
    }
  };
  const char* ask = reinterpret_cast<const char*>(row[0]) + kAhead;
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16, ask += kStepBytes) {
    if constexpr (kFirst) {
#pragma GCC unroll 8
      for (int64_t line = 0; line < kStepBytes; line += kLineBytes) {
        __builtin_prefetch(ask + line);
      }
    }
    step(row, d, d);
  }
  if (d < dim) {
    T tails[kRows][16];
    const T* from[kRows];
    __builtin_memset(tails, 0, sizeof tails);
    for (int r = 0; r < kRows; ++r) {
      __builtin_memcpy(tails[r], row[r] + d, static_cast<size_t>(dim - d) * sizeof(T));
      from[r] = tails[r];
    }
    step(from, 0, d);
  }
  if constexpr (kFirst && kOneTranspose) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[kProducts + r] = norms[r];
    }
  }
  const Vec8 totals = horizontal_sums(sums);
  if constexpr (kFirst) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      squares[r] = kOneTranspose ? totals[kProducts + r] : horizontal_sum(norms[r]);
    }
  }
  return totals;
}

// All queries of a batch against n rows, in tiles of kQueries x kRows; kQueries divides their padded number.
template <int kQueries, int kRows, class T>
int64_t scan_rows_of(const T* rows, int64_t row_stride, int64_t n, uint32_t keep, int64_t dim,
                     const PackedQueries& queries, const ScanBound& bound, PanelHit* hits) {
  uint32_t found[kDirectMax];
  // Of query q for row r of a tile at q * kRows + r: what a cutoff is made of.
  float thresholds[kDirectMax * kRows + 8] = {}, norms_x4[kDirectMax * kRows + 8] = {};
  for (int64_t q = 0; q < queries.batch; ++q) {
    found[q] = 0;
    for (int r = 0; r < kRows; ++r) {
      thresholds[q * kRows + r] = queries.thresholds[q];
      norms_x4[q * kRows + r] = queries.norms_x4[q];
    }
  }
  for (int64_t first = 0; first < n; first += kRows) {
    const T* row[kRows];
    for (int r = 0; r < kRows; ++r) {  // beyond the last row: the last again, its bit is not kept
      row[r] = rows + (first + r < n ? first + r : n - 1) * row_stride;
    }
    float squares[kRows], norm = 0.0f;
    for (int64_t q = 0; q < queries.batch; q += kQueries) {
      const float* tile = queries.padded + q * queries.padded_dim;
      Vec8 products;
      if (q == 0) {
        products = tile_products<kQueries, kRows, true>(row, dim, tile, queries.padded_dim, squares);
        float square = 0.0f;
        for (int r = 0; r < kRows; ++r) {
          square = squares[r] > square ? squares[r] : square;
          keep &= ~(static_cast<uint32_t>(squares[r] != squares[r]) << (first + r));
        }
        norm = __builtin_sqrtf(square * bound.norm_growth + bound.norm_floor);
      } else {
        products = tile_products<kQueries, kRows, false>(row, dim, tile, queries.padded_dim, squares);
      }
      const Vec8 cutoffs =
          load<Vec8>(thresholds + q * kRows) - bound.gamma_div4 * (load<Vec8>(norms_x4 + q * kRows) * norm);
      const uint32_t bits = not_below8(products, cutoffs);
      constexpr uint32_t kRowBits = (1u << kRows) - 1;
      if (bits != 0) {
        for (int j = 0; j < kQueries && q + j < queries.batch; ++j) {
          found[q + j] |= (bits >> (j * kRows) & kRowBits) << first;
        }
      }
    }
  }
  int64_t count = 0;
  for (int32_t q = 0; q < queries.batch; ++q) {
    if ((found[q] & keep) != 0) {
      hits[count++] = {q, found[q] & keep};
    }
  }
  return count;
}

template <class T>
int64_t scan_any_rows_of(const T* rows, int64_t row_stride, int64_t n, uint32_t keep, int64_t dim,
                         const PackedQueries& queries, const ScanBound& bound, PanelHit* hits) {
  if (queries.batch == 1) {
    return scan_rows_of<1, 4>(rows, row_stride, n, keep, dim, queries, bound, hits);
  }
  if (queries.batch == 2) {
    return scan_rows_of<2, 2>(rows, row_stride, n, keep, dim, queries, bound, hits);
  }
  return scan_rows_of<kTileQueries, 2>(rows, row_stride, n, keep, dim, queries, bound, hits);
}

}  // namespace
}  // namespace realm_kernels
