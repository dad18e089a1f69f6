// Rows of tokens of log_likelihood and of its gradient, read once and written once: what costs bandwidth in
// marginal_loss. Included by each instruction set's copy of it.
#include "cpu/marginal_loss.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace realm_kernels {
namespace {

typedef float FloatVec __attribute__((vector_size(kLanes * sizeof(float))));

// Numbers that are converted at a time, in a buffer on the stack; a multiple of kSumLanes.
constexpr int kChunk = 64;

// A sum over tokens is kept in as many parts, token m in part m mod kSumLanes: its bits depend neither on the
// instruction set nor on strides.
constexpr int kSumLanes = 8;
constexpr int kSumVecs = kSumLanes / kLanes;

inline int chunk_from(int64_t first, int64_t end) {
  return static_cast<int>(end - first < kChunk ? end - first : kChunk);
}

inline bool is_scored(const MarginalLossParams& params, int64_t b, int64_t m) {
  return params.token_mask == nullptr || params.token_mask[b * params.tokens + m];
}

inline bool any_scored(const MarginalLossParams& params, int64_t b) {
  for (int64_t m = 0; m < params.tokens; ++m) {
    if (is_scored(params, b, m)) return true;
  }
  return false;
}

#if defined(__AVX__) && !defined(__AVX512VL__)
inline __m128i first_lanes_of_four(int lanes) {
  return _mm_cmpgt_epi32(_mm_set1_epi32(lanes), _mm_setr_epi32(0, 1, 2, 3));
}
#endif

inline Vec widened(const double* source) {
  Vec result;
  memcpy(&result, source, sizeof result);
  return result;
}

inline Vec widened(const float* source) {
#if defined(__AVX__) && !defined(__AVX512F__)
  // GCC 12 makes two halves and a shuffle of the conversion below.
  return _mm256_cvtps_pd(_mm_loadu_ps(source));
#else
  FloatVec result;
  memcpy(&result, source, sizeof result);
  return __builtin_convertvector(result, Vec);
#endif
}

// The first `lanes` < kLanes numbers of a row, zero in the other lanes.
inline Vec widened_first(const float* source, int lanes) {
#if defined(__AVX512VL__)
  const FloatVec values = _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << lanes) - 1), source);
  return __builtin_convertvector(values, Vec);
#elif defined(__AVX__)
  return _mm256_cvtps_pd(_mm_maskload_ps(source, first_lanes_of_four(lanes)));
#else
  Vec result{};
  for (int j = 0; j < lanes; ++j) result[j] = source[j];
  return result;
#endif
}

inline Vec widened_first(const double* source, int lanes) {
  double values[kLanes] = {};
  for (int j = 0; j < lanes; ++j) values[j] = source[j];
  return widened(values);
}

// The sum of source[m], m in [0, count), in parts: parts[i] holds those of m mod kSumLanes in [i kLanes, (i +
// 1) kLanes).
template <class T>
inline void add_to_parts(const T* source, int64_t count, Vec (&parts)[kSumVecs]) {
  int64_t m = 0;
  for (; m + kSumLanes <= count; m += kSumLanes) {
    for (int i = 0; i < kSumVecs; ++i) parts[i] += widened(source + m + i * kLanes);
  }
  int i = 0;
  for (; m + kLanes <= count; m += kLanes) parts[i++] += widened(source + m);
  if (m < count) parts[i] += widened_first(source + m, static_cast<int>(count - m));
}

inline double sum_of_parts(Vec (&parts)[kSumVecs]) {
  for (int half = kSumVecs / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return sum_of(parts[0]);
}

// sum_m c_m l_km of example b to out[k], for every document.
inline void sum_tokens(const MarginalLossParams& params, int64_t b, double* out) {
  const bool* const mask = params.token_mask == nullptr ? nullptr : params.token_mask + b * params.tokens;
  const bool direct =
      mask == nullptr && params.log_likelihood.type == FloatType::kFloat32 && params.stride_m == 1;
  double values[kChunk];
  for (int64_t k = 0; k < params.documents; ++k) {
    const int64_t row = b * params.stride_b + k * params.stride_k;
    Vec parts[kSumVecs] = {};
    if (direct) {
      add_to_parts(static_cast<const float*>(params.log_likelihood.data) + row, params.tokens, parts);
    } else {
      for (int64_t first = 0; first < params.tokens; first += kChunk) {
        const int count = chunk_from(first, params.tokens);
        load(params.log_likelihood, row + first * params.stride_m, params.stride_m, count, values);
        for (int i = 0; i < count && mask != nullptr; ++i) values[i] = mask[first + i] ? values[i] : 0.0;
        add_to_parts(values, count, parts);
      }
    }
    out[k] = sum_of_parts(parts);
  }
}

template <class T>
inline void spread_as(const MarginalLossParams& params, int64_t b, const double* values) {
  const bool* const mask = params.token_mask == nullptr ? nullptr : params.token_mask + b * params.tokens;
  T* target = static_cast<T*>(params.d_log_likelihood) + b * params.documents * params.tokens;
  T zero;
  from_double(0.0, &zero);
  for (int64_t k = 0; k < params.documents; ++k, target += params.tokens) {
    T value;
    from_double(values[k], &value);
    if (mask == nullptr) {
      for (int64_t m = 0; m < params.tokens; ++m) target[m] = value;
    } else {
      for (int64_t m = 0; m < params.tokens; ++m) target[m] = mask[m] ? value : zero;
    }
  }
}

// values[k] to d_log_likelihood[b, k, m] of every scored token m, zero to the others.
inline void spread_over_tokens(const MarginalLossParams& params, int64_t b, const double* values) {
  switch (params.log_likelihood.type) {
    case FloatType::kFloat32:
      return spread_as<float>(params, b, values);
    case FloatType::kFloat64:
      return spread_as<double>(params, b, values);
    case FloatType::kBFloat16:
      return spread_as<BFloat16>(params, b, values);
    case FloatType::kFloat16:
      return spread_as<Float16>(params, b, values);
  }
}

// The first `lanes` lanes from a row, zero in the others.
inline Vec load_lanes(const FloatArray& array, int64_t offset, int64_t stride, int lanes) {
  if (array.type == FloatType::kFloat32 && stride == 1) {
    const float* const source = static_cast<const float*>(array.data) + offset;
    return lanes == kLanes ? widened(source) : widened_first(source, lanes);
  }
  double values[kLanes] = {};
  load(array, offset, stride, lanes, values);
  return widened(values);
}

template <class T>
inline Vec load_first(const T* source, int lanes) {
  return lanes == kLanes ? widened(source) : widened_first(source, lanes);
}

inline void store_first(double* target, int lanes, Vec value) {
  if (lanes == kLanes) {
    memcpy(target, &value, sizeof value);
  } else {
    for (int j = 0; j < lanes; ++j) target[j] = value[j];
  }
}

inline void store_first(float* target, int lanes, Vec value) {
  if (lanes == kLanes) {
    const FloatVec whole = __builtin_convertvector(value, FloatVec);
    memcpy(target, &whole, sizeof whole);
    return;
  }
#if defined(__AVX512VL__)
  const FloatVec part = __builtin_convertvector(value, FloatVec);
  _mm256_mask_storeu_ps(target, static_cast<__mmask8>((1u << lanes) - 1), part);
#elif defined(__AVX__)
  _mm_maskstore_ps(target, first_lanes_of_four(lanes), _mm256_cvtpd_ps(value));
#else
  for (int j = 0; j < lanes; ++j) target[j] = static_cast<float>(value[j]);
#endif
}

// The first `lanes` lanes to a row.
inline void store_lanes(void* data, FloatType type, int64_t offset, int lanes, Vec value) {
  if (type == FloatType::kFloat32) return store_first(static_cast<float*>(data) + offset, lanes, value);
  double values[kLanes];
  memcpy(values, &value, sizeof values);
  store(data, type, offset, lanes, values, 1);
}

}  // namespace
}  // namespace realm_kernels
