// int8 codes of rows: how they are made, and the scan that reads them. Part of mips_topk_body.inl.
//
// A row is x = mean + s c + e with integers |c| <= 127 and one scale s for the kCodeRows rows of a panel; a
// query is q = t d + f with integers d. So
//
//     q . x = q . mean + s t (d . c) + s (f . c) + q . e,
//
// and the last two are at most ||f|| X + ||q|| E for X >= s ||c|| and E >= ||e|| of every row of the panel.
// What (d . c) must exceed for a row to matter is one integer a query and panel, and the scan is integers
// only. Codes are kept as c + 128, since the instructions multiply unsigned by signed bytes; d . (c + 128) is
// larger by 128 times the sum of d, which the cutoff takes in.
//
// A panel is [D / 4 rounded up to even][kCodeRows][4]: four codes of a row fill one lane.
#pragma once

#include <cstdint>

#include "cpu/mips_topk_elements.inl"
#include "cpu/mips_topk_kernels.h"

namespace realm_kernels {
namespace {

typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UIntVec __attribute__((vector_size(4 * kWidth)));
typedef uint8_t Byte8 __attribute__((vector_size(8)));
typedef uint8_t Byte4 __attribute__((vector_size(4)));

constexpr int64_t kQuadBytes = 4 * kCodeRows;  // from four dimensions of a panel to the next four

// sum += products of four unsigned codes of rows a with four signed ones of a query, then of rows b.
#if defined(__AVX512VNNI__)
constexpr int kQueryCodeMax = 127;
inline IntVec dot8(IntVec sum, IntVec a, int32_t query_a, IntVec b, int32_t query_b) {
  sum = (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, _mm512_set1_epi32(query_a));
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, _mm512_set1_epi32(query_b));
}
#elif defined(__AVX512BW__)
// Four products of 255 x 31 are the most that sixteen bits hold.
constexpr int kQueryCodeMax = 31;
inline IntVec dot8(IntVec sum, IntVec a, int32_t query_a, IntVec b, int32_t query_b) {
  const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)a, _mm512_set1_epi32(query_a)),
                                         _mm512_maddubs_epi16((__m512i)b, _mm512_set1_epi32(query_b)));
  return sum + (IntVec)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif defined(__AVX2__)
// Four products of 255 x 31 are the most that sixteen bits hold.
constexpr int kQueryCodeMax = 31;
inline IntVec dot8(IntVec sum, IntVec a, int32_t query_a, IntVec b, int32_t query_b) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)a, _mm256_set1_epi32(query_a)),
                                         _mm256_maddubs_epi16((__m256i)b, _mm256_set1_epi32(query_b)));
  return sum + (IntVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr int kQueryCodeMax = 127;
inline IntVec dot4(IntVec sum, IntVec codes, int32_t query) {
  const UIntVec bytes = (UIntVec)codes;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int32_t code = static_cast<int8_t>(static_cast<uint32_t>(query) >> (8 * i));
    sum += (IntVec)(bytes >> (8 * i) & 0xffu) * code;
  }
  return sum;
}
inline IntVec dot8(IntVec sum, IntVec a, int32_t query_a, IntVec b, int32_t query_b) {
  return dot4(dot4(sum, a, query_a), b, query_b);
}
#endif

inline uint32_t above(IntVec sums, int32_t cutoff) {
#if defined(__AVX512F__)
  return _mm512_cmpgt_epi32_mask((__m512i)sums, _mm512_set1_epi32(cutoff));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32((__m256i)sums, _mm256_set1_epi32(cutoff)))));
#else
  uint32_t bits = 0;
  for (int r = 0; r < kWidth; ++r) {
    bits |= static_cast<uint32_t>(sums[r] > cutoff) << r;
  }
  return bits;
#endif
}

// Bits that vanish in the float32 sums below, as a part of the largest term: there are fewer than ten
// roundings.
constexpr float kRounding = 0x1p-20f;
// No d . c reaches this: D <= kMaxCodeDim.
constexpr float kAllSums = 0x1p30f;

// For every query the largest integer that its sum need not exceed. Wherever infinity or NaN comes in, the
// row is admitted.
void write_cutoffs(const CodeBounds& bounds, const QueryCodes& queries) {
  const float inverse = 1.0f / bounds.scale;
  for (int64_t q = 0; q < queries.batch; ++q) {
    const float threshold = queries.thresholds[q], offset = queries.offsets[q];
    const float reach =
        queries.norms[q] * bounds.residual_norm + queries.residual_norms[q] * bounds.code_norm;
    const float size = __builtin_fabsf(threshold) + __builtin_fabsf(offset) + reach;
    const float low = ((threshold - offset) - reach) - size * kRounding;
    const float sum = low * (inverse * queries.inverse_scales[q]);
    const float lowered = sum - __builtin_fabsf(sum) * kRounding - 2.0f;
    const float floor = lowered > -kAllSums ? lowered : -kAllSums;
    queries.cutoffs[q] = static_cast<int32_t>(floor < kAllSums ? floor : kAllSums) + queries.code_sums[q];
  }
}

template <int kQueries>
inline int64_t scan_code_group(const uint8_t* codes, int64_t quads, uint32_t keep, const int32_t* packed,
                               int64_t first_query, const int32_t* cutoffs, const char* ask, int64_t lines,
                               PanelHit* hits) {
  constexpr int kPart = 2 * kWidth;  // rows
  uint32_t found[kQueries] = {};
  for (int first = 0; first < kCodeRows; first += kPart) {
    IntVec low[kQueries], high[kQueries];
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      low[q] = high[q] = IntVec{};
    }
    const uint8_t* from = codes + 4 * first;
    for (int64_t quad = 0; quad < quads; quad += 2, from += 2 * kQuadBytes) {
      if (lines > 0) {
        __builtin_prefetch(ask);
        ask += kLineBytes;
        --lines;
      }
      const IntVec a_low = load<IntVec>(from), a_high = load<IntVec>(from + 4 * kWidth);
      const IntVec b_low = load<IntVec>(from + kQuadBytes);
      const IntVec b_high = load<IntVec>(from + kQuadBytes + 4 * kWidth);
#pragma GCC unroll 16
      for (int q = 0; q < kQueries; ++q) {
        const int32_t query_a = packed[quad * kQueries + q], query_b = packed[(quad + 1) * kQueries + q];
        low[q] = dot8(low[q], a_low, query_a, b_low, query_b);
        high[q] = dot8(high[q], a_high, query_a, b_high, query_b);
      }
    }
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      const int32_t cutoff = cutoffs[first_query + q];
      found[q] |= (above(low[q], cutoff) | above(high[q], cutoff) << kWidth) << first;
    }
  }
  int64_t count = 0;
#pragma GCC unroll 16
  for (int q = 0; q < kQueries; ++q) {
    if ((found[q] & keep) != 0) {
      hits[count++] = {static_cast<int32_t>(first_query + q), found[q] & keep};
    }
  }
  return count;
}

// Counts down to the instantiation for the size of a group.
template <int kQueries>
inline int64_t scan_code_group_of(int64_t size, const uint8_t* codes, int64_t quads, uint32_t keep,
                                  const int32_t* packed, int64_t first_query, const int32_t* cutoffs,
                                  const char* ask, int64_t lines, PanelHit* hits) {
  if constexpr (kQueries > 0) {
    if (size == kQueries) {
      return scan_code_group<kQueries>(codes, quads, keep, packed, first_query, cutoffs, ask, lines, hits);
    }
    return scan_code_group_of<kQueries - 1>(size, codes, quads, keep, packed, first_query, cutoffs, ask,
                                            lines, hits);
  }
  return 0;
}

int64_t quads_of(int64_t dim) { return (dim + 7) / 8 * 2; }

int64_t scan_codes(const uint8_t* codes, const CodeBounds& bounds, uint32_t keep, int64_t dim,
                   const QueryCodes& queries, int64_t next, PanelHit* hits) {
  write_cutoffs(bounds, queries);
  const int64_t quads = quads_of(dim);
  const int64_t lines = (next / kLineBytes + queries.groups.count - 1) / queries.groups.count;
  const char* ask = reinterpret_cast<const char*>(codes) + quads * kQuadBytes;
  int64_t count = 0, q = 0;
  for (int64_t g = 0; g < queries.groups.count; ++g, ask += lines * kLineBytes) {
    const int64_t size = queries.groups.size + (g < queries.groups.larger ? 1 : 0);
    count += scan_code_group_of<kCodeGroup>(size, codes, quads, keep, queries.packed + q * quads, q,
                                            queries.cutoffs, ask, lines, hits + count);
    q += size;
  }
  return count;
}

// The four codes of a row of the dimensions from 4 quad on.
inline uint32_t load_quad(const uint8_t* codes, int64_t quad, int64_t row) {
  uint32_t four;
  __builtin_memcpy(&four, codes + quad * kQuadBytes + 4 * row, 4);
  return four;
}

// Eight of them as float32.
inline Vec8 codes_as_floats(uint64_t eight) {
#if defined(__AVX2__)
  // GCC 12 takes each byte out for itself in the conversion below.
  const Int8 bytes = (Int8)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(eight)));
#else
  const Int8 bytes = __builtin_convertvector((Byte8)eight, Int8);
#endif
  return __builtin_convertvector(bytes - 128, Vec8);
}

ScoreInterval refine(const uint8_t* codes, const CodeBounds& bounds, int64_t dim, const QueryCodes& queries,
                     int64_t query, int64_t row) {
  constexpr uint64_t kZeros = 0x8080808080808080;
  const float* q = queries.padded + query * queries.padded_dim;
  const int64_t quads = quads_of(dim);
  uint64_t nonzero = 0;
  const auto products = [&](int64_t quad) __attribute__((always_inline)) {
    const uint64_t eight =
        load_quad(codes, quad, row) | static_cast<uint64_t>(load_quad(codes, quad + 1, row)) << 32;
    nonzero |= eight ^ kZeros;
    return codes_as_floats(eight) * load<Vec8>(q + 4 * quad);
  };
  Vec8 even = {}, odd = {};
  int64_t quad = 0;
  for (; quad + 4 <= quads; quad += 4) {
    even += products(quad);
    odd += products(quad + 2);
  }
  if (quad < quads) {
    even += products(quad);
  }
  const float norm = queries.norms[query], offset = queries.offsets[query];
  const float product = bounds.scale * horizontal_sum(even + odd);
  // D roundings of at most ||q|| X each, ten of what is added here, and what is too small for a float32.
  const float gamma = static_cast<float>(dim + 16) * 0x1p-23f;
  const float reach = norm * bounds.residual_norm + gamma * (norm * bounds.code_norm);
  const float size = __builtin_fabsf(product) + __builtin_fabsf(offset) + reach;
  const float error = reach + size * kRounding + static_cast<float>(dim + 8) * 0x1p-148f;
  const float lower = (product + offset) - error, upper = (product + offset) + error;
  const float infinity = __builtin_inff();
  if (!(lower > -infinity && upper < infinity)) {
    return {-infinity, infinity};
  }
  // Codes of zero may stand for a row with NaN.
  return {nonzero != 0 ? lower : -infinity, upper};
}

// At least `value`; the last term is for a subnormal one, of which a factor may add nothing.
inline float round_up(double value) {
  const float rounded = static_cast<float>(value * (1.0 + 0x1p-20)) + 0x1p-149f;
  return rounded == rounded ? rounded : __builtin_inff();
}

// Scales of all panels lie in a range where their products and quotients neither vanish nor overflow.
constexpr float kLeastScale = 0x1p-60f;

template <class T>
CodeBounds encode_panel_of(const T* rows, int64_t row_stride, int64_t n, int64_t dim, const float* mean,
                           uint8_t* codes) {
  float largest = 0.0f, largest_mean = 0.0f;
  Vec8 top = {}, top_mean = {};
  const auto larger = [](Vec8 a, Vec8 b) __attribute__((always_inline)) {
    const Vec8 magnitude = (Vec8)((UInt8)b & 0x7fffffffu);
    return magnitude > a && magnitude < __builtin_inff() ? magnitude : a;
  };
  for (int64_t d = 0; d < dim; d += 8) {
    const Vec8 centre = load_any(mean, d, dim);
    top_mean = larger(top_mean, centre);
    for (int64_t r = 0; r < n; ++r) {
      top = larger(top, load_any(rows + r * row_stride, d, dim) - centre);
    }
  }
  for (int i = 0; i < 8; ++i) {
    largest = top[i] > largest ? top[i] : largest;
    largest_mean = top_mean[i] > largest_mean ? top_mean[i] : largest_mean;
  }
  const float scale = largest / 127.0f > kLeastScale ? largest / 127.0f : kLeastScale;
  const float inverse = 1.0f / scale;
  const Vec8 limit = Vec8{} + 127.0f;
  // Adding and subtracting 1.5 x 2^23 rounds to an integer.
  constexpr float kRound = 0x1.8p23f;
  double residual = 0.0;
  float code_square = 0.0f;
  __builtin_memset(codes, 128, static_cast<size_t>(quads_of(dim) * kQuadBytes));
  for (int64_t r = 0; r < n; ++r) {
    Double8 residuals = {};
    Vec8 squares = {};
    for (int64_t d = 0; d < dim; d += 8) {
      const Vec8 x = load_any(rows + r * row_stride, d, dim), centre = load_any(mean, d, dim);
      Vec8 c = (x - centre) * inverse;
      c = c > -limit ? c : -limit;  // NaN becomes -127, and its residual NaN
      c = c < limit ? c : limit;
      c = (c + kRound) - kRound;
      const Double8 e = (__builtin_convertvector(x, Double8) - __builtin_convertvector(centre, Double8)) -
                        static_cast<double>(scale) * __builtin_convertvector(c, Double8);
      residuals += e * e;
      squares += c * c;
      const Byte8 bytes = __builtin_convertvector(__builtin_convertvector(c, Int8) + 128, Byte8);
      __builtin_memcpy(codes + d / 4 * kQuadBytes + 4 * r, &bytes, 4);
      __builtin_memcpy(codes + (d / 4 + 1) * kQuadBytes + 4 * r, reinterpret_cast<const uint8_t*>(&bytes) + 4,
                       4);
    }
    double sum = 0.0;
    for (int i = 0; i < 8; ++i) {
      sum += residuals[i];
    }
    if (sum != sum) {  // a row with NaN is never returned: codes of zero bring up few queries
      for (int64_t quad = 0; quad < quads_of(dim); ++quad) {
        __builtin_memset(codes + quad * kQuadBytes + 4 * r, 128, 4);
      }
      continue;
    }
    residual = sum > residual ? sum : residual;
    const float square = horizontal_sum(squares);
    code_square = square > code_square ? square : code_square;
  }
  // Each e is off by at most 2^-51 of the largest term. Sums of D products in float64, q . mean and the
  // canonical score, are off by less than 2^-52 D ||q|| times a norm, which is at most sqrt(D) of the largest
  // terms.
  const double terms = static_cast<double>(largest) + largest_mean;
  const double slack = 0x1p-50 * static_cast<double>(dim) * __builtin_sqrt(static_cast<double>(dim)) * terms;
  return {scale, round_up(__builtin_sqrt(residual) + slack),
          round_up(static_cast<double>(scale) * __builtin_sqrt(code_square * (1.0 + 0x1p-10)))};
}

}  // namespace
}  // namespace realm_kernels
