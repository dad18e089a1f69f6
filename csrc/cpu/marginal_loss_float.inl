// Rows of any float type to doubles and back. Included by each instruction set's copy of marginal_loss.
#include <stdint.h>
#include <string.h>

#include "cpu/marginal_loss.h"

namespace realm_kernels {
namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double to_double(float value) { return value; }
inline double to_double(double value) { return value; }
inline double to_double(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline double to_double(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  double result;
  if (magnitude < 0x0400u) {
    result = magnitude * 0x1p-24;  // zero and subnormal
  } else {
    // The exponent's bias grows from 15 to 127; all ones, of infinity and NaN, stay all ones.
    const uint32_t bias = magnitude < 0x7c00u ? 112u << 23 : 0x70000000u;
    result = float_of((magnitude << 13) + bias);
  }
  return value.bits & 0x8000u ? -result : result;
}

inline void from_double(double value, float* out) { *out = static_cast<float>(value); }
inline void from_double(double value, double* out) { *out = value; }

// Round to nearest, ties to even, by way of float as torch does.
inline void from_double(double value, BFloat16* out) {
  const uint32_t bits = bits_of(static_cast<float>(value));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void from_double(double value, Float16* out) {
  const uint32_t bits = bits_of(static_cast<float>(value));
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // 65536 and above
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 puts its last bit where float rounds.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

template <class T>
inline void load_as(const void* data, int64_t offset, int64_t stride, int64_t count, double* out) {
  const T* source = static_cast<const T*>(data) + offset;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_double(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = to_double(source[i * stride]);
  }
}

template <class T>
inline void store_as(void* data, int64_t offset, int64_t count, const double* values, int64_t stride) {
  T* target = static_cast<T*>(data) + offset;
  for (int64_t i = 0; i < count; ++i) from_double(values[i * stride], target + i);
}

inline void load(const FloatArray& array, int64_t offset, int64_t stride, int64_t count, double* out) {
  switch (array.type) {
    case FloatType::kFloat32:
      return load_as<float>(array.data, offset, stride, count, out);
    case FloatType::kFloat64:
      return load_as<double>(array.data, offset, stride, count, out);
    case FloatType::kBFloat16:
      return load_as<BFloat16>(array.data, offset, stride, count, out);
    case FloatType::kFloat16:
      return load_as<Float16>(array.data, offset, stride, count, out);
  }
}

// values[i * stride] to the row at offset.
inline void store(void* data, FloatType type, int64_t offset, int64_t count, const double* values,
                  int64_t stride) {
  switch (type) {
    case FloatType::kFloat32:
      return store_as<float>(data, offset, count, values, stride);
    case FloatType::kFloat64:
      return store_as<double>(data, offset, count, values, stride);
    case FloatType::kBFloat16:
      return store_as<BFloat16>(data, offset, count, values, stride);
    case FloatType::kFloat16:
      return store_as<Float16>(data, offset, count, values, stride);
  }
}

}  // namespace
}  // namespace realm_kernels
