// What the drivers of the sanitizer builds are made of: random numbers, arrays of any float type, comparison.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/marginal_loss.h"

namespace sanitize {

using realm_kernels::FloatType;
using realm_kernels::Isa;
using realm_kernels::size_of;

// ThreadSanitizer looks at who touches what and not at values, and it is slow: one dtype and one kind of
// values serve it.
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadsOnly = true;
#else
constexpr bool kThreadsOnly = false;
#endif

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// The same numbers everywhere for a seed; the standard's distributions would not give them.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  double uniform(double low, double high) {
    return low + (high - low) * std::ldexp(static_cast<double>(engine_() >> 11), -53);
  }

 private:
  std::mt19937_64 engine_;
};

inline const char* name_of(FloatType type) {
  switch (type) {
    case FloatType::kFloat64:
      return "float64";
    case FloatType::kFloat32:
      return "float32";
    case FloatType::kBFloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}

// Elements of one float type on the heap, in a block of exactly their size: one byte beyond it is an error
// that AddressSanitizer sees.
class Elements {
 public:
  Elements(FloatType type, int64_t count)
      : type_(type), count_(count), bytes_(new unsigned char[count * size_of(type)]) {
    for (int64_t i = 0; i < count; ++i) {
      set(i, kNan);
    }
  }

  // Rounds towards zero to the type; read back what it became.
  void set(int64_t i, double value) {
    if (type_ == FloatType::kFloat64) {
      put(i, value);
    } else if (type_ == FloatType::kFloat16) {
      put(i, half_bits(value));
    } else {
      const float rounded = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &rounded, sizeof bits);
      type_ == FloatType::kFloat32 ? put(i, rounded) : put(i, static_cast<uint16_t>(bits >> 16));
    }
  }

  double get(int64_t i) const {
    if (type_ == FloatType::kFloat64) {
      return at<double>(i);
    }
    if (type_ == FloatType::kFloat32) {
      return static_cast<double>(at<float>(i));
    }
    if (type_ == FloatType::kFloat16) {
      return half_value(at<uint16_t>(i));
    }
    const uint32_t bits = static_cast<uint32_t>(at<uint16_t>(i)) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<double>(value);
  }

  FloatType type() const { return type_; }
  int64_t count() const { return count_; }
  void* data() { return bytes_.get(); }
  const void* data() const { return bytes_.get(); }

 private:
  template <class T>
  void put(int64_t i, T value) {
    std::memcpy(bytes_.get() + i * static_cast<int64_t>(sizeof value), &value, sizeof value);
  }
  template <class T>
  T at(int64_t i) const {
    T value;
    std::memcpy(&value, bytes_.get() + i * static_cast<int64_t>(sizeof value), sizeof value);
    return value;
  }

  static uint16_t half_bits(double value) {
    const double magnitude = std::fabs(value);
    uint32_t bits;
    if (std::isnan(value)) {
      bits = 0x7e00;
    } else if (magnitude >= 65536.0) {
      bits = 0x7c00;
    } else if (magnitude < 0x1p-14) {
      bits = static_cast<uint32_t>(std::ldexp(magnitude, 24));
    } else {
      const int exponent = std::ilogb(magnitude);
      const auto fraction = static_cast<uint32_t>(std::ldexp(magnitude, 10 - exponent));  // 1024 .. 2047
      bits = (static_cast<uint32_t>(exponent + 15) << 10) + (fraction - 1024);
    }
    return static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000u : 0u));
  }

  static double half_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 31  ? (fraction == 0 ? kInfinity : kNan)
                             : exponent == 0 ? std::ldexp(fraction, -24)
                                             : std::ldexp(1024 + fraction, exponent - 25);
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
  }

  FloatType type_;
  int64_t count_;
  std::unique_ptr<unsigned char[]> bytes_;
};

// A mask of exactly `count` bools.
class Mask {
 public:
  Mask(int64_t count, bool value) : bools_(new bool[count]) {
    for (int64_t i = 0; i < count; ++i) {
      bools_[i] = value;
    }
  }
  bool& operator[](int64_t i) { return bools_[i]; }
  bool operator[](int64_t i) const { return bools_[i]; }
  bool* data() const { return bools_.get(); }

 private:
  std::unique_ptr<bool[]> bools_;
};

inline Mask draw_mask(Random& random, int64_t count, double share) {
  Mask mask(count, false);
  for (int64_t i = 0; i < count; ++i) {
    mask[i] = random.uniform(0, 1) < share;
  }
  return mask;
}

// Says where, and ends the program: a sanitizer build is run to be right or to stop.
[[noreturn]] inline void fail(const std::string& where, int64_t at, double got, double wanted) {
  std::fprintf(stderr, "%s: at %lld: got %.17g, expected %.17g\n", where.c_str(), static_cast<long long>(at),
               got, wanted);
  std::exit(1);
}

// Accuracy has tests of its own; these must only tell a result from one made of a wrong read.
inline void expect_within(const std::string& where, int64_t at, double got, double wanted, double bound) {
  const bool same = got == wanted || (std::isnan(got) && std::isnan(wanted));
  if (!same && !(std::fabs(got - wanted) <= bound)) {
    fail(where, at, got, wanted);
  }
}

// Both sides sum at most a few thousand terms in float64 (below 2^-35 of the largest), then round to `type`.
inline void expect_close(const std::string& where, int64_t at, double got, double wanted, double largest,
                         FloatType type) {
  const double unit = type == FloatType::kFloat64    ? 0x1p-52
                      : type == FloatType::kFloat32  ? 0x1p-23
                      : type == FloatType::kBFloat16 ? 0x1p-8
                                                     : 0x1p-11;
  // The last term: float16 has no number nearer to zero.
  expect_within(where, at, got, wanted, largest * 0x1p-35 + std::fabs(wanted) * unit + 0x1p-24);
}

// Each runs its op over its cases, on every instruction set of this processor, and returns how many calls it
// made; `fail`s at the first wrong result.
int64_t run_mips_topk();
int64_t run_marginal_loss();
int64_t run_linear_marginal_loss();
int64_t run_span_evidence();
int64_t run_score_spans();

}  // namespace sanitize
