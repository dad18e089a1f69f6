// The instructions of sm_90a that the scan is made of, a function each. Compiled by g++ they come from the
// model of the machine (tests/cuda_model/hopper.h), which runs the same kernels on a CPU.
#pragma once

#include "cuda/sm90/layout.h"

#ifndef __CUDACC__
#include "hopper.h"
#else

#include <cuda.h>

namespace realm_kernels {
namespace cuda {
namespace sm90 {

using TensorMap = CUtensorMap;

RK_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// mbarrier: `count` arrivals, and all bytes that were announced, end a phase.
RK_DEVICE void barrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
// Makes the initialised barriers visible to the async proxy (TMA).
RK_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
RK_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// At the barrier that has this place in the shared memory of block `rank` of the cluster. It says that reads
// are done and hands over nothing that was written, so the order within a block, the default, will do: to
// release to the cluster would be to wait until all that was stored has reached L2.
RK_DEVICE void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
RK_DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
RK_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Every thread of every block of the cluster.
RK_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// A box of the tensor to shared memory, swizzled; what lies outside the tensor becomes zero and counts as
// bytes.
RK_DEVICE void tma_load(const TensorMap* map, void* to, uint64_t* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// The same to this place in every block of the cluster whose bit is set, its bytes told to the barrier there.
RK_DEVICE void tma_load_multicast(const TensorMap* map, void* to, uint64_t* barrier, int column, int row,
                                  uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}
RK_DEVICE void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// wgmma reads registers and shared memory behind the program's back: fence before the first of a series,
// commit after the last, wait until at most kPending series are under way, then the accumulators may be read.
RK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
RK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
RK_DEVICE void keep(float& x) { asm volatile("" : "+f"(x)::"memory"); }
RK_DEVICE void keep(int& x) { asm volatile("" : "+r"(x)::"memory"); }
template <int kPending>
RK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <int kPending, class T, int kCount>
RK_DEVICE void wgmma_wait(T (&accumulators)[kCount]) {
  wgmma_wait<kPending>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    keep(accumulators[i]);  // no read of them moves above the wait
  }
}

template <int kRegisters>
RK_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
RK_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Among the 128 threads of consumer group 0 or 1. Immediate numbers: a barrier in a register reserves all 16.
RK_DEVICE void warp_group_sync(int group) {
  if (group == 0) {
    asm volatile("bar.sync 1, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 2, 128;" ::: "memory");
  }
}

RK_DEVICE int uniform(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

RK_DEVICE Vector16 load_shared(uint32_t address) {
  Vector16 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "r"(address)
               : "memory");
  return v;
}

}  // namespace sm90
}  // namespace cuda
}  // namespace realm_kernels
#endif
