// The words of CUDA C++ that kernels are written in. Compiled by g++ they come from the model of a GPU
// (tests/cuda_model/machine.h), which runs the same kernels on a CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RK_BOTH __host__ __device__
#define RK_DEVICE __device__ __forceinline__

namespace realm_kernels {
namespace cuda {

RK_DEVICE unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
RK_DEVICE float half_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
RK_DEVICE float round_up_to_float(double x) { return __double2float_ru(x); }
RK_DEVICE float round_down_to_float(double x) { return __double2float_rd(x); }
RK_DEVICE float to_float_up(int x) { return __int2float_ru(x); }
RK_DEVICE float add_up(float a, float b) { return __fadd_ru(a, b); }
RK_DEVICE float subtract_down(float a, float b) { return __fsub_rd(a, b); }
RK_DEVICE float multiply_up(float a, float b) { return __fmul_ru(a, b); }
RK_DEVICE float multiply_down(float a, float b) { return __fmul_rd(a, b); }
RK_DEVICE float multiply_add_up(float a, float b, float c) { return __fmaf_ru(a, b, c); }
// What other blocks have written: past this multiprocessor's own cache.
RK_DEVICE int64_t load_from_others(const int64_t* place) {
  return static_cast<int64_t>(__ldcg(reinterpret_cast<const long long*>(place)));
}

}  // namespace cuda
}  // namespace realm_kernels
#else

#define RK_BOTH
#include "machine.h"
#endif

namespace realm_kernels {
namespace cuda {

template <class T>
RK_BOTH constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

struct alignas(16) Vector16 {
  uint32_t words[4];
};

}  // namespace cuda
}  // namespace realm_kernels
