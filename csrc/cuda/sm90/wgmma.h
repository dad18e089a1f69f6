// wgmma of sm_90a with both operands in shared memory: a warp group adds the product of 64 x K and N x K to
// accumulators that lie over its threads as fragment_row() and fragment_column() say. K is 32 bytes.
#pragma once

#include "cuda/sm90/ptx.h"

namespace realm_kernels {
namespace cuda {
namespace sm90 {

// What is multiplied: the type of its accumulators, and the bytes of an element.
struct BFloat16 {
  using Accumulator = float;
  static constexpr int kBytes = 2;
};
struct Float16 {
  using Accumulator = float;
  static constexpr int kBytes = 2;
};
struct Int8 {
  using Accumulator = int;
  static constexpr int kBytes = 1;
};

#ifdef __CUDACC__
// The operands of an instruction: kN / 2 accumulators, two descriptors, and whether to add to what was there.
#define RK_REGISTERS_32                                                                 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22," \
  "%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define RK_REGISTERS_64                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,"    \
  "%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define RK_8(c, d, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define RK_32(c, d, i) RK_8(c, d, i), RK_8(c, d, i + 8), RK_8(c, d, i + 16), RK_8(c, d, i + 24)
#define RK_64(c, d) RK_32(c, d, 0), RK_32(c, d, 32)
#define RK_FLOAT "+f"
#define RK_INT "+r"

#define RK_WGMMA_32(instruction, constraint, tail)                                              \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n" instruction " " RK_REGISTERS_32 \
               ", %32, %33, add" tail ";\n}\n"                                                  \
               : RK_32(constraint, d, 0)                                                        \
               : "l"(a), "l"(b), "r"(add))
#define RK_WGMMA_64(instruction, constraint, tail)                                              \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n" instruction " " RK_REGISTERS_64 \
               ", %64, %65, add" tail ";\n}\n"                                                  \
               : RK_64(constraint, d)                                                           \
               : "l"(a), "l"(b), "r"(add))
#define RK_AS_IS ", 1, 1, 0, 0"  // operands neither negated nor transposed: both are K-major

template <class Element>
RK_DEVICE void wgmma(typename Element::Accumulator (&d)[32], uint64_t a, uint64_t b, int add);  // n = 64
template <class Element>
RK_DEVICE void wgmma(typename Element::Accumulator (&d)[64], uint64_t a, uint64_t b, int add);  // n = 128

template <>
RK_DEVICE void wgmma<BFloat16>(float (&d)[32], uint64_t a, uint64_t b, int add) {
  RK_WGMMA_32("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", RK_FLOAT, RK_AS_IS);
}
template <>
RK_DEVICE void wgmma<BFloat16>(float (&d)[64], uint64_t a, uint64_t b, int add) {
  RK_WGMMA_64("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", RK_FLOAT, RK_AS_IS);
}
template <>
RK_DEVICE void wgmma<Float16>(float (&d)[32], uint64_t a, uint64_t b, int add) {
  RK_WGMMA_32("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16", RK_FLOAT, RK_AS_IS);
}
template <>
RK_DEVICE void wgmma<Float16>(float (&d)[64], uint64_t a, uint64_t b, int add) {
  RK_WGMMA_64("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", RK_FLOAT, RK_AS_IS);
}
template <>
RK_DEVICE void wgmma<Int8>(int (&d)[32], uint64_t a, uint64_t b, int add) {
  RK_WGMMA_32("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8", RK_INT, "");
}
template <>
RK_DEVICE void wgmma<Int8>(int (&d)[64], uint64_t a, uint64_t b, int add) {
  RK_WGMMA_64("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8", RK_INT, "");
}
#endif

}  // namespace sm90
}  // namespace cuda
}  // namespace realm_kernels
