// The search of mips_topk in five launches: prepare, scan, select, rescore, repair. Every block of queries of
// a pass is answered by all of them; nothing in between is read by the host.
#include "cuda/mips_topk.h"

#include "cuda/load_kernel.h"
#include "cuda/sm90/mips_topk_scan.h"

namespace realm_kernels {
namespace cuda {
namespace {

// Of 512 threads: two leave a thread 64 registers. Over codes more is held at once, and one block has as many
// loads under way.
constexpr int blocks_per_multiprocessor(bool codes) { return codes ? 1 : 2; }

__global__ void __launch_bounds__(kPrepareThreads)
    mips_topk_prepare_kernel(const __grid_constant__ SearchArguments a, bool is_float16) {
  prepare(a, is_float16);
}
template <bool kCodes>
__global__ void __launch_bounds__(kSearchThreads, blocks_per_multiprocessor(kCodes))
    mips_topk_select_kernel(const __grid_constant__ SearchArguments a) {
  select<kCodes>(a);
}
template <bool kCodes>
__global__ void __launch_bounds__(kSearchThreads, blocks_per_multiprocessor(kCodes))
    mips_topk_rescore_kernel(const __grid_constant__ SearchArguments a) {
  rescore<kCodes>(a);
}
__global__ void __launch_bounds__(kSearchThreads)  // rare, and it holds more at once
    mips_topk_repair_kernel(const __grid_constant__ SearchArguments a) {
  repair(a);
}

template <class... Arguments>
cudaError_t run(void (*kernel)(Arguments...), int blocks, int threads, int64_t shared, cudaStream_t stream,
                const SearchArguments& a, bool is_float16 = false) {
  if constexpr (sizeof...(Arguments) == 2) {
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared),
             stream>>>(a, is_float16);
  } else {
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared),
             stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace

MipsTopkPlan plan_mips_topk(const SearchShape& shape) {
  const SearchPlan p = search_plan(shape);
  return {p.batch,          p.at.bytes,    static_cast<int>(p.shape),
          p.kept,           p.selected,    p.shared.stages,
          p.shared.bytes(), p.scan_blocks, p.cluster,
          p.at.words,       p.pitch};
}

cudaError_t load_mips_topk(int* large_clusters) {
  cudaError_t status = load_kernel(mips_topk_prepare_kernel);
  for (const auto kernel :
       {mips_topk_select_kernel<false>, mips_topk_select_kernel<true>, mips_topk_rescore_kernel<false>,
        mips_topk_rescore_kernel<true>, mips_topk_repair_kernel}) {
    status = status == cudaSuccess ? load_kernel(kernel) : status;
  }
  return status == cudaSuccess ? sm90::load_scan(large_clusters) : status;
}

cudaError_t launch_mips_topk(const MipsTopkLaunch& launch, cudaStream_t stream) {
  SearchPlan p = search_plan(launch.shape);
  const SearchArguments a = search_arguments(p, launch.params, launch.workspace);
  if (a.batch > p.batch || a.batch == 0) {
    return a.batch == 0 ? cudaSuccess : cudaErrorInvalidValue;
  }
  plan_scan(p, launch.shape, a.batch);
  constexpr int kThreads = kSearchThreads;
  const int64_t scoring = scoring_bytes(kThreads, a.dim);
  const int preparing = prepare_blocks(a, launch.shape.multiprocessors);
  cudaError_t status = run(mips_topk_prepare_kernel, preparing, kPrepareThreads, 512, stream, a,
                           launch.shape.scanned == Scanned::kFloat16);
  status = status == cudaSuccess ? sm90::launch_scan(p, a, launch.with_maxima, stream) : status;
  if (!launch.whole || !launch.with_maxima) {
    return status;
  }
  if (status == cudaSuccess) {
    const auto select = a.codes != nullptr ? mips_topk_select_kernel<true> : mips_topk_select_kernel<false>;
    status = run(select, a.batch, kThreads, top_keys_bytes(kThreads, kGroupKeys), stream, a);
  }
  if (status == cudaSuccess) {
    const auto rescore =
        a.codes != nullptr ? mips_topk_rescore_kernel<true> : mips_topk_rescore_kernel<false>;
    const int64_t shared = scoring_bytes(kThreads, a.dim, a.codes != nullptr ? a.code_pitch : 0);
    status = run(rescore, rescore_blocks(a, kThreads), kThreads, shared, stream, a);
  }
  if (status == cudaSuccess) {
    status = run(mips_topk_repair_kernel, launch.shape.multiprocessors, kThreads, scoring, stream, a);
  }
  return status;
}

}  // namespace cuda
}  // namespace realm_kernels
