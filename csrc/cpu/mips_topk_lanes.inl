// Rows as they lie and groups of queries in the lanes of vectors: neither are rows packed, as in panels, nor
// sums taken across lanes, as in tiles (mips_topk_rows.inl). Part of mips_topk_body.inl.
//
// A step is four bytes of a row: one dimension of float32 or a pair of bfloat16. kSplit steps of a row are
// broadcast together and multiplied by a vector of queries, packed [steps / kSplit][queries][kSplit], so a
// group of few queries fills a vector too; the sums of a query lie in kSplit lanes until the end. kRows *
// kVectors multiply-adds follow kRows + kVectors loads: the multiply-add units or the memory are the limit.
#pragma once

#include <cstdint>

#include "cpu/mips_topk_elements.inl"
#include "cpu/mips_topk_kernels.h"
#include "cpu/mips_topk_panels.inl"
#include "cpu/mips_topk_rows.inl"

namespace realm_kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorLanes = 16;
#else
constexpr int kVectorLanes = 8;
#endif
typedef float LaneVec __attribute__((vector_size(4 * kVectorLanes)));
typedef uint32_t LaneBits __attribute__((vector_size(4 * kVectorLanes)));
typedef uint64_t LaneWords __attribute__((vector_size(4 * kVectorLanes)));

// Of a group of queries, the largest.
constexpr int kMaxLanes = 2 * kVectorLanes;
// Queries of a batch that is scanned so: with sixteen registers panels are quicker, but the portable code is
// the test of the others.
constexpr int kLanesMax = kWidth == 8 ? 0 : kMaxQueryBlock;
// Rows of a tile with one vector of queries: enough accumulators to hide the latency of a multiply-add.
constexpr int kTileRows = kVectorLanes;

// A bit for each lane that is not below its cutoff; NaN counts as not below.
inline uint32_t lanes_not_below(LaneVec scores, LaneVec cutoffs) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)scores, (__m512)cutoffs, _CMP_NLT_UQ);
#else
  return not_below8(scores, cutoffs);
#endif
}

// kSplit steps over and over. By integers: a pair of bfloat16 is no float32.
template <int kSplit>
inline LaneVec broadcast(const char* from) {
  if constexpr (kSplit == 1) {
    return (LaneVec)(LaneBits{} + load<uint32_t>(from));
  } else if constexpr (kSplit == 2) {
    return (LaneVec)(LaneWords{} + load<uint64_t>(from));
  } else {
#if defined(__AVX512F__)
    return (LaneVec)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(reinterpret_cast<const float*>(from)));
#else
    static_assert(kSplit < 4, "a group of queries fills a vector");
#endif
  }
}

// The sums of each kSplit lanes, in all of them.
template <int kSplit>
inline LaneVec folded(LaneVec sums) {
  LaneBits lane;
  for (uint32_t i = 0; i < kVectorLanes; ++i) {
    lane[i] = i;
  }
  for (uint32_t apart = 1; apart < kSplit; apart *= 2) {
    sums += __builtin_shuffle(sums, lane ^ apart);
  }
  return sums;
}

// Products of kRows rows and one group of queries, while `ask` is fetched line after line.
template <class Step, int kSplit, int kVectors, int kRows>
inline void lane_products(const char* rows, int64_t stride, int64_t row_bytes, const float* packed,
                          const char* ask, LaneVec (&sums)[kRows][kVectors]) {
  constexpr int kBases = (kRows + 3) / 4;
  constexpr int kBytes = 4 * kSplit;
  constexpr int kUnroll = 4 / kSplit;
  constexpr int kLines = kUnroll * kBytes * kRows / kLineBytes;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = LaneVec{};
    }
  }
  const auto step = [&](const auto& address) __attribute__((always_inline)) {
    LaneVec query[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      query[v] = load<LaneVec>(packed + v * kVectorLanes);
    }
    packed += kVectors * kVectorLanes;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const LaneVec x = broadcast<kSplit>(address(r));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = Step::add_products(sums[r][v], query[v], x);
      }
    }
  };
  // Every fourth row has a pointer, so that an address is a sum of two registers.
  const char* base[kBases];
#pragma GCC unroll 4
  for (int b = 0; b < kBases; ++b) {
    base[b] = rows + 4 * b * stride;
  }
  const int64_t three = 3 * stride;
  int64_t done = 0;
  for (; done + kUnroll * kBytes <= row_bytes; done += kUnroll * kBytes) {
    // To the second cache: the first serves the rows at hand, column after column.
#pragma GCC unroll 4
    for (int line = 0; line < kLines; ++line) {
      __builtin_prefetch(ask + line * kLineBytes, 0, 2);
    }
    ask += kLines * kLineBytes;
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      step([&](int r) __attribute__((always_inline)) {
        return base[r / 4] + (r % 4 == 3 ? three : r % 4 * stride) + u * kBytes;
      });
    }
#pragma GCC unroll 4
    for (int b = 0; b < kBases; ++b) {
      base[b] += kUnroll * kBytes;
    }
  }
  if (done < row_bytes) {
    char tails[kRows][kUnroll * kBytes];
    __builtin_memset(tails, 0, sizeof tails);
    for (int r = 0; r < kRows; ++r) {
      __builtin_memcpy(tails[r], rows + r * stride + done, static_cast<size_t>(row_bytes - done));
    }
    for (int at = 0; done + at < row_bytes; at += kBytes) {
      step([&](int r) __attribute__((always_inline)) { return tails[r] + at; });
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = folded<kSplit>(sums[r][v]);
    }
  }
}

// Squared norms, in eight parts, and whether an element was one that the instruction takes for zero.
struct RowSquares {
  Vec8 of(const float* row, int64_t dim) {
    Vec8 even = {}, odd = {};
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) {
      const Vec8 a = load8(row + d), b = load8(row + d + 8);
      even += a * a;
      odd += b * b;
    }
    for (; d < dim; d += 8) {
      const Vec8 a = load_any(row, d, dim);
      even += a * a;
    }
    return even + odd;
  }

#if defined(__AVX512BF16__)
  Vec8 of(const BFloat16* row, int64_t dim) {
    __m512 sum = {};
    const auto add = [&](__m512i x) __attribute__((always_inline)) {
      sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x);
      // Zero becomes the largest number, what is subnormal stays below the smallest normal one.
      const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
      least = _mm512_min_epu16(least, _mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)));
    };
    int64_t d = 0;
    for (; d + 32 <= dim; d += 32) {
      add(_mm512_loadu_si512(row + d));
    }
    if (d < dim) {
      add(_mm512_maskz_loadu_epi16((1u << (dim - d)) - 1, row + d));
    }
    Vec8 halves[2];
    __builtin_memcpy(halves, &sum, sizeof sum);
    return halves[0] + halves[1];
  }
  bool subnormal() const { return _mm512_cmplt_epu16_mask(least, _mm512_set1_epi16(0x7f)) != 0; }

  __m512i least = _mm512_set1_epi16(-1);
#else
  Vec8 of(const BFloat16* row, int64_t dim) {
    Vec8 squares = {};
    for (int64_t d = 0; d < dim; d += 16) {
      note_pairs((UInt8)load_pairs(row, d, dim), squares, flushed);
    }
    return squares;
  }
  bool subnormal() const {
    int32_t any = 0;
    for (int i = 0; i < 8; ++i) {
      any |= flushed[i];
    }
    return any != 0;
  }

  Int8 flushed = {};
#endif
};

// What bounds the error of a tile: its largest norm. Rows with NaN are not kept.
template <int kRows, class T>
inline float tile_norm(const T* rows, int64_t row_stride, int64_t first, int64_t dim, const ScanBound& bound,
                       uint32_t& keep) {
  RowSquares row_squares;
  float square = 0.0f;
  for (int r = 0; r < kRows; r += 8) {
    Vec8 squares[8] = {};
    for (int i = 0; i < 8 && r + i < kRows; ++i) {
      squares[i] = row_squares.of(rows + (r + i) * row_stride, dim);
    }
    const Vec8 sums = horizontal_sums(squares);
    for (int i = 0; i < 8 && r + i < kRows; ++i) {
      square = sums[i] > square ? sums[i] : square;
      keep &= ~(static_cast<uint32_t>(sums[i] != sums[i]) << (first + r + i));
    }
  }
  return row_squares.subnormal() ? __builtin_inff()
                                 : __builtin_sqrtf(square * bound.norm_growth + bound.norm_floor);
}

// What cutoffs are made of, of all queries of a batch, each in kSplit lanes; none is found beyond.
struct LaneBounds {
  float thresholds[4 * kMaxQueryBlock];
  float norms_x4[4 * kMaxQueryBlock];
};

// Adds to `found` the rows of a tile, from the panel's row `first` on, that may matter, of each query.
template <class Step, int kSplit, int kVectors, int kRows, class T>
inline void scan_lane_tile(const T* rows, int64_t row_stride, int64_t first, int64_t dim,
                           const PackedQueries& queries, const LaneBounds& bounds, const ScanBound& bound,
                           uint32_t& keep, uint32_t* found) {
  constexpr int kQueries = kVectors * kVectorLanes / kSplit;
  constexpr int64_t kAhead = 8192;  // bytes
  const int64_t size = sizeof(T);
  const char* const tile = reinterpret_cast<const char*>(rows + first * row_stride);
  float norm = 0.0f;
  for (int64_t q = 0; q < queries.batch; q += kQueries) {
    LaneVec sums[kRows][kVectors];
    // The rows come from memory once, with the first queries.
    lane_products<Step, kSplit, kVectors, kRows>(tile, row_stride * size, dim * size,
                                                 queries.packed + q * queries.panel_dim,
                                                 q == 0 ? tile + kAhead : tile, sums);
    if (q == 0) {
      norm = tile_norm<kRows>(rows + first * row_stride, row_stride, first, dim, bound, keep);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t lane = q * kSplit + v * kVectorLanes;
      const LaneVec cutoffs = load<LaneVec>(bounds.thresholds + lane) -
                              bound.gamma_div4 * (load<LaneVec>(bounds.norms_x4 + lane) * norm);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        for (uint32_t bits = lanes_not_below(sums[r][v], cutoffs); bits != 0; bits &= bits - 1) {
          found[(lane + __builtin_ctz(bits)) / kSplit] |= uint32_t{1} << (first + r);
        }
      }
    }
  }
}

template <class Step, int kSplit, int kVectors, class T>
int64_t scan_lanes_of(const T* rows, int64_t row_stride, int64_t n, uint32_t keep, int64_t dim,
                      const PackedQueries& queries, const ScanBound& bound, PanelHit* hits) {
  constexpr int kRows = kTileRows / kVectors;
  LaneBounds bounds;
  const int64_t size = queries.groups.count * queries.groups.size;
  for (int64_t q = 0; q < size; ++q) {
    const float threshold = q < queries.batch ? queries.thresholds[q] : __builtin_inff();
    const float norm_x4 = q < queries.batch ? queries.norms_x4[q] : 0.0f;
    for (int64_t lane = q * kSplit; lane < (q + 1) * kSplit; ++lane) {
      bounds.thresholds[lane] = threshold;
      bounds.norms_x4[lane] = norm_x4;
    }
  }
  uint32_t found[kMaxQueryBlock] = {};
  int64_t r = 0;
  for (; r + kRows <= n; r += kRows) {
    scan_lane_tile<Step, kSplit, kVectors, kRows>(rows, row_stride, r, dim, queries, bounds, bound, keep,
                                                  found);
  }
  for (; r < n; ++r) {
    scan_lane_tile<Step, kSplit, kVectors, 1>(rows, row_stride, r, dim, queries, bounds, bound, keep, found);
  }
  int64_t count = 0;
  for (int32_t q = 0; q < queries.batch; ++q) {
    if ((found[q] & keep) != 0) {
      hits[count++] = {q, found[q] & keep};
    }
  }
  return count;
}

// By the size of a group of queries.
template <class Step, class T>
int64_t scan_any_lanes_of(const T* rows, int64_t row_stride, int64_t n, uint32_t keep, int64_t dim,
                          const PackedQueries& queries, const ScanBound& bound, PanelHit* hits) {
  switch (kMaxLanes / queries.groups.size) {
    case 1:
      return scan_lanes_of<Step, 1, 2>(rows, row_stride, n, keep, dim, queries, bound, hits);
    case 2:
      return scan_lanes_of<Step, 1, 1>(rows, row_stride, n, keep, dim, queries, bound, hits);
    case 4:
      return scan_lanes_of<Step, 2, 1>(rows, row_stride, n, keep, dim, queries, bound, hits);
    default:
#if defined(__AVX512F__)
      return scan_lanes_of<Step, 4, 1>(rows, row_stride, n, keep, dim, queries, bound, hits);
#else
      return 0;
#endif
  }
}

int64_t scan_lanes(const void* rows, ScalarType type, int64_t row_stride, int64_t n, uint32_t keep,
                   int64_t dim, const PackedQueries& queries, const ScanBound& bound, PanelHit* hits) {
  return type == ScalarType::kFloat32
             ? scan_any_lanes_of<OneDimension>(static_cast<const float*>(rows), row_stride, n, keep, dim,
                                               queries, bound, hits)
             : scan_any_lanes_of<TwoDimensions>(static_cast<const BFloat16*>(rows), row_stride, n, keep, dim,
                                                queries, bound, hits);
}

}  // namespace
}  // namespace realm_kernels
