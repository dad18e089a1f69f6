// Each loop is the innermost one of a scan without its loads: one instruction, named in assembly so that no
// compiler merges, moves or drops one, on twelve accumulators. That many hide the latency of two multiply-add
// units (4 cycles x 2) and fit into sixteen registers beside two operands.
#include "cpu/fma_ceiling.h"

#include "cpu/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace realm_kernels {
namespace {

constexpr int kChains = 12;

struct Loop {
  void (*run)(int64_t steps);
  int64_t multiply_adds;  // of one instruction; 0: this processor has none
};

#if defined(__x86_64__)

__attribute__((target("avx2,fma"))) void float32_avx2(int64_t steps) {
  __m256 sums[kChains] = {};
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0x1p-20f);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sums[c]) : "x"(a), "x"(b));
    }
  }
}

__attribute__((target("avx512f"))) void float32_avx512(int64_t steps) {
  __m512 sums[kChains] = {};
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0x1p-20f);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      asm volatile("vfmadd231ps %2, %1, %0" : "+v"(sums[c]) : "v"(a), "v"(b));
    }
  }
}

__attribute__((target("avx512f"))) void bfloat16_avx512(int64_t steps) {
  __m512 sums[kChains] = {};
  const __m512i a = _mm512_set1_epi32(0x3f003f00), b = _mm512_set1_epi32(0x35803580);  // 2^-1, 2^-20
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      asm volatile("vdpbf16ps %2, %1, %0" : "+v"(sums[c]) : "v"(a), "v"(b));
    }
  }
}

// Products in pairs of 16 bits, added there: a scan that widens its sums to 32 bits now and then comes below.
__attribute__((target("avx2"))) void int8_avx2(int64_t steps) {
  __m256i sums[kChains] = {};
  const __m256i a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(1);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      __m256i products;
      asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
                   : "+x"(sums[c]), "=&x"(products)
                   : "x"(a), "x"(b));
    }
  }
}

__attribute__((target("avx512f"))) void int8_avx512(int64_t steps) {
  __m512i sums[kChains] = {};
  const __m512i a = _mm512_set1_epi32(0x01010101), b = a;
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      asm volatile("vpdpbusd %2, %1, %0" : "+v"(sums[c]) : "v"(a), "v"(b));
    }
  }
}

Loop loop_for(const std::string& kind) {
  __builtin_cpu_init();
  if (kind == "int8") {
    return __builtin_cpu_supports("avx512vnni") ? Loop{&int8_avx512, 64}
           : __builtin_cpu_supports("avx2")     ? Loop{&int8_avx2, 32}
                                                : Loop{nullptr, 0};
  }
  if (kind == "bfloat16") {
    return __builtin_cpu_supports("avx512bf16") ? Loop{&bfloat16_avx512, 32} : Loop{nullptr, 0};
  }
  return __builtin_cpu_supports("avx512f")                                 ? Loop{&float32_avx512, 16}
         : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Loop{&float32_avx2, 8}
                                                                           : Loop{nullptr, 0};
}

#else

Loop loop_for(const std::string&) { return {nullptr, 0}; }

#endif

}  // namespace

int64_t fma_ceiling(const std::string& kind, int64_t steps, int num_threads) {
  const Loop loop = loop_for(kind);
  if (loop.multiply_adds == 0) {
    return 0;
  }
  parallel_for(num_threads, num_threads, [&](int64_t, int64_t, int) { loop.run(steps); });
  return 2 * loop.multiply_adds * kChains * steps * num_threads;
}

}  // namespace realm_kernels
